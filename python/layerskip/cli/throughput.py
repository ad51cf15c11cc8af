"""Tokens a second of batches: ours both ways, and transformers' batched ``generate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..decoding import SelfSpeculativeDecoder
from .ways import AUTOREGRESSIVE, SELF_SPECULATIVE, TRANSFORMERS


@dataclass
class Batch:
    """Tokens a second of all sequences of a batch together, by the way of decoding; the prompts' time counts."""

    size: int
    tokens_per_second: dict[str, float]
    identical: bool


def measure(
    decoder: SelfSpeculativeDecoder, model: Any, encoded: Sequence[Tensor], sizes: Sequence[int], new_tokens: int
) -> list[Batch]:
    """Decode batches of ``encoded`` prompts [1, N], each row to ``new_tokens``; without ``model``, ours alone."""
    batches = []
    for size in sizes:
        prompts = [encoded[index % len(encoded)][0] for index in range(size)]
        plain, plain_speed = _timed(_ours, decoder, prompts, new_tokens, "autoregressive")
        out, speed = _timed(_ours, decoder, prompts, new_tokens, "self_speculative")
        speeds = {AUTOREGRESSIVE: plain_speed, SELF_SPECULATIVE: speed}
        if model is not None:
            _, speeds[TRANSFORMERS] = _timed(_theirs, model, prompts, new_tokens)
        batches.append(Batch(size, speeds, torch.equal(plain, out)))
    return batches


def _timed(decode: Callable[..., Tensor], engine: Any, prompts: list[Tensor], new_tokens: int, *rest: Any) -> Any:
    """What the second of two calls gives, and its tokens a second."""
    decode(engine, prompts, new_tokens, *rest)
    start = time.perf_counter()
    out = decode(engine, prompts, new_tokens, *rest)
    return out, len(prompts) * new_tokens / (time.perf_counter() - start)


def _ours(decoder: SelfSpeculativeDecoder, prompts: list[Tensor], new_tokens: int, strategy: str) -> Tensor:
    return decoder.generate(prompts, new_tokens, strategy=strategy, eos_token_id=[]).new_tokens


def _theirs(model: Any, prompts: list[Tensor], new_tokens: int) -> Tensor:
    """Padded on the left, as transformers wants it; no token ends a row, so that all give ``new_tokens``."""
    flipped = [prompt.flip(0) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(flipped, batch_first=True).flip(1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in flipped], batch_first=True).flip(1)
    config, eos = model.generation_config, model.generation_config.eos_token_id
    config.eos_token_id = None
    try:
        return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    finally:
        config.eos_token_id = eos


def throughput_table(batches: Sequence[Batch]) -> Table:
    """A line for each size."""
    names = list(batches[0].tokens_per_second)
    table = Table("batch", *names, "speedup", title="tokens/s of a batch, prompts included", title_justify="left")
    for batch in batches:
        speeds = batch.tokens_per_second
        speedup = speeds[SELF_SPECULATIVE] / speeds[AUTOREGRESSIVE]
        table.add_row(str(batch.size), *(f"{speeds[name]:.1f}" for name in names), f"{speedup:.2f}×")
    return table
