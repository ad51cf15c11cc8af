"""Tokens a second of batches: ours both ways, and transformers' batched ``generate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..decoding import SelfSpeculativeDecoder, validation
from .ways import AUTOREGRESSIVE, SELF_SPECULATIVE, TRANSFORMERS


@dataclass
class BatchSpeed:
    """Tokens a second of all sequences of a batch together, by the way of decoding; the prompts' time counts."""

    size: int
    tokens_per_second: dict[str, float]
    identical: bool


def measure(
    decoder: SelfSpeculativeDecoder, model: Any, encoded: Sequence[Tensor], sizes: Sequence[int], new_tokens: int
) -> Iterator[BatchSpeed]:
    """Decode batches of ``encoded`` prompts [1, N], each row to its end or ``new_tokens``; each as it is measured.

    Only the tokens of the rows themselves count, not what pads them. Without ``model``, ours alone.
    """
    for size in sizes:
        prompts = [encoded[index % len(encoded)][0] for index in range(size)]
        plain, plain_speed = _timed(_ours, decoder, prompts, new_tokens, "autoregressive")
        out, speed = _timed(_ours, decoder, prompts, new_tokens, "self_speculative")
        speeds = {AUTOREGRESSIVE: plain_speed, SELF_SPECULATIVE: speed}
        if model is not None:
            _, speeds[TRANSFORMERS] = _timed(_theirs, model, prompts, new_tokens)
        yield BatchSpeed(size, speeds, plain == out)


def _timed(
    decode: Callable[..., list[list[int]]], engine: Any, prompts: list[Tensor], *rest: Any
) -> tuple[list[list[int]], float]:
    """What the second of two calls gives, and its tokens a second."""
    decode(engine, prompts, *rest)
    start = time.perf_counter()
    rows = decode(engine, prompts, *rest)
    return rows, sum(map(len, rows)) / (time.perf_counter() - start)


def _ours(decoder: SelfSpeculativeDecoder, prompts: list[Tensor], new_tokens: int, strategy: str) -> list[list[int]]:
    out = decoder.generate(prompts, new_tokens, strategy=strategy)
    return [row[: stats.new_tokens].tolist() for row, stats in zip(out.new_tokens, out.per_sequence, strict=True)]


def _theirs(model: Any, prompts: list[Tensor], new_tokens: int) -> list[list[int]]:
    """Padded on the left, as transformers wants it, and cut after each row's first EOS token."""
    flipped = [prompt.flip(0) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(flipped, batch_first=True).flip(1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in flipped], batch_first=True).flip(1)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    stops = validation.stop_tokens(model.generation_config.eos_token_id, model.config.vocab_size)
    rows = out[:, ids.shape[1] :].tolist()
    ends = [next((index + 1 for index, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def throughput_table(batches: Sequence[BatchSpeed]) -> Table:
    """A line for each size."""
    names = list(batches[0].tokens_per_second)
    table = Table("batch", *names, "speedup", title="tokens/s of a batch, prompts included", title_justify="left")
    for batch in batches:
        speeds = batch.tokens_per_second
        speedup = speeds[SELF_SPECULATIVE] / speeds[AUTOREGRESSIVE]
        table.add_row(str(batch.size), *(f"{speeds[name]:.1f}" for name in names), f"{speedup:.2f}×")
    return table
