"""How the logits of sequences are processed, as tensors: what a round on the device needs no host for."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .sampling import SamplingParams
from .sending import sent


@dataclass(frozen=True)
class LogitsControls:
    """Bias, repetition penalty, temperature, top-k, top-p, min-p: entry b of every tensor belongs to sequence b.

    What is None is not wanted by any sequence.

    Attributes
    ----------
    temperature : Tensor [B, 1], fp32
        1 where nothing is drawn.
    draws : Tensor [B], fp32
        1 where a token is to be drawn from the processed logits, 0 where the largest is to be taken.
    bias : Tensor [B, V], fp32, or None
    penalty : Tensor [B, 1], fp32, or None
    seen : Tensor [B, V], bool, or None
        The tokens that the penalty is for: those of the prompt and those after it. A round adds what it emits.
    top_k : Tensor [B, 1], int64, or None
        V where none are dropped.
    top_p, min_p : Tensor [B, 1], fp32, or None
    largest_k : int
        Not less than any k that drops anything: a power of two, so that few rounds are recorded.
    """

    temperature: Tensor
    draws: Tensor
    bias: Tensor | None
    penalty: Tensor | None
    seen: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    largest_k: int

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], before: Sequence[Tensor], vocab_size: int, device: torch.device
    ) -> LogitsControls:
        """The tensors of what the host knows.

        Parameters
        ----------
        params : sequence of SamplingParams
            One for each sequence.
        before : sequence of Tensor [n], int64
            The tokens of each sequence so far.
        vocab_size : int
        device : torch.device
        """

        def numbers(values: list[float]) -> Tensor:
            return sent(torch.tensor(values, dtype=torch.float32), device)

        def column(values: list[float], neutral: float) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return numbers(values)[:, None]

        # The cuts spare greedy sequences: the largest logit survives every cut.
        top_k = [vocab_size if one.greedy else min(int(one.top_k) or vocab_size, vocab_size) for one in params]
        cuts = [k for k in top_k if k < vocab_size]
        penalty = column([one.repetition_penalty for one in params], 1.0)
        return cls(
            numbers([one.temperature or 1.0 for one in params])[:, None],
            numbers([0.0 if one.greedy else 1.0 for one in params]),
            _bias(params, vocab_size, device),
            penalty,
            None if penalty is None else _seen(before, vocab_size, device),
            sent(torch.tensor(top_k), device)[:, None] if cuts else None,
            column([1.0 if one.greedy else one.top_p for one in params], 1.0),
            column([0.0 if one.greedy else one.min_p for one in params], 0.0),
            min(1 << (max(cuts) - 1).bit_length(), vocab_size) if cuts else 0,
        )

    @property
    def form(self) -> Hashable:
        """What the work on logits depends on besides values."""
        return (*self._tensors, self.largest_k)

    @property
    def tensors(self) -> list[Tensor]:
        """All there are, in an order that the form fixes."""
        return list(self._tensors.values())

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def each(self, change: Callable[[Tensor], Tensor]) -> LogitsControls:
        """The same with changed tensors."""
        changed: dict[str, Any] = {name: change(value) for name, value in self._tensors.items()}
        return replace(self, **changed)

    def apart(self) -> LogitsControls:
        """The same with a copy of the tokens that were seen, to which drafts may be added."""
        return self if self.seen is None else replace(self, seen=self.seen.clone())

    def see(self, tokens: Tensor) -> None:
        """Add tokens [B, n]. One that was not drafted is added as token 0, and nobody looks at what comes after it."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens.clamp_min(0), True)

    def put_seen(self, rows: Tensor, others: LogitsControls) -> None:
        """Take over what these ``rows`` have seen, of which ``others`` are a copy."""
        if self.seen is not None and others.seen is not None:
            self.seen[rows] = others.seen

    def penalized(self, logits: Tensor) -> Tensor:
        """Logits [B, V], fp32, with bias and repetition penalty."""
        if self.bias is not None:
            logits = logits + self.bias
        if self.penalty is None:
            return logits
        assert self.seen is not None
        changed = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.seen, changed, logits)

    def cut(self, logits: Tensor) -> Tensor:
        """Logits [B, V] over the temperature, then -inf for what top-k, top-p and min-p drop, in this order."""
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = _keep_top_k(logits, self.top_k, self.largest_k)
        if self.top_p is not None:
            logits = _keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            floor = logits.amax(-1, keepdim=True) + self.min_p.log()
            logits = logits.masked_fill(logits < floor, -math.inf)
        return logits


def _seen(before: Sequence[Tensor], vocab_size: int, device: torch.device) -> Tensor:
    seen = torch.zeros(len(before), vocab_size, dtype=torch.bool, device=device)
    for row, tokens in zip(seen, before, strict=True):
        row[tokens] = True
    return seen


def _bias(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Tensor | None:
    if not any(one.logit_bias for one in params):
        return None
    bias = torch.zeros(len(params), vocab_size, dtype=torch.float32)
    for row, one in zip(bias, params, strict=True):
        if one.logit_bias:
            row[torch.tensor(list(one.logit_bias))] = torch.tensor(list(one.logit_bias.values()), dtype=torch.float32)
    return sent(bias, device)


def _keep_top_k(logits: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    """Drop what is smaller than the k-th largest; no k that drops anything is greater than ``largest_k``."""
    ranked = logits.topk(largest_k, -1).values  # [B, largest_k]
    threshold = ranked.gather(1, (top_k - 1).clamp_max(largest_k - 1))
    return logits.masked_fill((logits < threshold) & (top_k <= largest_k), -math.inf)


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Drop the least probable tokens that together have at most 1 - p; never the most probable one."""
    ascending, order = logits.sort(-1)
    drop = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1].fill_(False)
    return logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -math.inf)
