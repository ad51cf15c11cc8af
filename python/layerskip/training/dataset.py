"""Prompt-completion pairs as token ids, batched by length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ._seeds import generator
from .loss import IGNORE

BUCKET = 50  # batches that are sorted by length together


def encode_pair(tokenizer: Any, prompt: str, completion: str, max_length: int) -> dict[str, list[int]]:
    """Token ids of prompt, completion and end of text; labels on what follows the prompt.

    The two are tokenized apart, as generation does, so that training meets the same boundary.
    """
    context = list(tokenizer(prompt).input_ids) if prompt else []
    target = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = (context + target)[:max_length]
    return {"input_ids": ids, "labels": ([IGNORE] * len(context) + target)[:max_length]}


def encode(tokenizer: Any, examples: Sequence[Any], max_length: int = 1024) -> list[dict[str, list[int]]]:
    """Encode examples, objects or dicts with ``prompt`` and ``completion``; those whose prompt fills all are left out.

    Raises
    ------
    ValueError
        If nothing is left, or an example has no such field (with its index).
    """
    pairs = []
    for index, example in enumerate(examples):
        fields = example if isinstance(example, Mapping) else vars(example)
        for name in ("prompt", "completion"):
            if not isinstance(fields.get(name), str):
                raise ValueError(f"example {index} has no text {name!r}: {fields}")
        pairs.append(encode_pair(tokenizer, fields["prompt"], fields["completion"], max_length))
    kept = [pair for pair in pairs if any(label != IGNORE for label in pair["labels"][1:])]
    if not kept:
        raise ValueError(f"none of {len(pairs)} examples has a completion within {max_length} tokens")
    return kept


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Pairs from a JSON-lines file with ``prompt`` and ``completion``.

    Raises
    ------
    ValueError
        For a broken line, with its number.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("prompt", "completion")):
            raise ValueError(f"{path}:{number}: expected an object with texts 'prompt' and 'completion', got {line!r}")
        pairs.append(pair)
    return pairs


class Collator:
    """Pads on the right, to the longest of the batch.

    No attention mask is made: under a causal mask nothing real sees the padding behind it, and padding has no label.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Batch ``input_ids`` and ``labels``, [B, S]."""
        length = max(len(pair["input_ids"]) for pair in pairs)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([pair[key] + [value] * (length - len(pair[key])) for pair in pairs])

        return {"input_ids": padded("input_ids", self.pad_token_id), "labels": padded("labels", IGNORE)}


class LengthBuckets(Sampler[int]):
    """A shuffled order in which the examples of a batch are of similar length; a function of (seed, epoch)."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        source = generator("order", self.seed, self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=source).tolist()
        size = self.batch_size * BUCKET
        ordered = [
            index
            for begin in range(0, len(shuffled), size)
            for index in sorted(shuffled[begin : begin + size], key=lambda index: self.lengths[index])
        ]
        whole = len(ordered) // self.batch_size  # a short batch stays the last, where the loader expects it
        for batch in torch.randperm(whole, generator=source).tolist():
            yield from ordered[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from ordered[whole * self.batch_size :]
