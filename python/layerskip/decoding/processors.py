"""What sampling parameters do to logits, for many sequences at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sampling import SamplingParams

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""(history [n] int64: prompt, emitted tokens and the drafts before this position; logits [V] fp32) -> logits [V]."""


class Processors:
    """Bias, repetition penalty, a caller's own processor, temperature, top-k, top-p, min-p, in transformers' order.

    Parameters
    ----------
    params : sequence of SamplingParams
        One a sequence.
    own : sequence of LogitsProcessor or None
        One a sequence.
    vocab_size : int
    device : torch.device

    Attributes
    ----------
    failures : dict of int to Exception
        What a sequence's own processor raised; the sequence's logits then pass unchanged.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        own: Sequence[LogitsProcessor | None],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._own = own
        self.failures: dict[int, Exception] = {}
        self._bias = _bias(params, vocab_size, device)
        self._penalty = column([one.repetition_penalty for one in params])
        self._penalizes = any(one.repetition_penalty != 1 for one in params)
        # A greedy sequence is cut nowhere: its arg-max would survive it anyhow.
        self._temperature = column([one.temperature or 1.0 for one in params])
        top_k = [vocab_size if one.greedy else min(one.top_k or vocab_size, vocab_size) for one in params]
        self._top_k = None if min(top_k) == vocab_size else torch.tensor(top_k, device=device)[:, None]
        self._largest_k = max((k for k in top_k if k < vocab_size), default=0)
        self._top_p = _column_or_none([1.0 if one.greedy else one.top_p for one in params], 1.0, column)
        self._min_p = _column_or_none([0.0 if one.greedy else one.min_p for one in params], 0.0, column)
        self.temperature = column([0.0 if one.greedy else 1.0 for one in params])[:, 0]
        """[B]: what remains to be done to processed logits, 1 to draw from them and 0 to take the largest."""

    @property
    def look_back(self) -> bool:
        """Whether they need the histories."""
        return self._penalizes or any(own is not None for own in self._own)

    def __call__(self, logits: Tensor, histories: Sequence[Tensor]) -> Tensor:
        """Processed logits.

        Parameters
        ----------
        logits : Tensor [B, V], fp32
        histories : sequence of Tensor [n], int64
            The tokens before this position, of each sequence.

        Returns
        -------
        Tensor [B, V], fp32
            -inf for a token that can't be drawn.
        """
        if self._bias is not None:
            logits = logits + self._bias
        if self._penalizes:
            logits = self._penalize(logits, histories)
        logits = self._apply_own(logits, histories) / self._temperature
        if self._top_k is not None:
            logits = _keep_top_k(logits, self._top_k, self._largest_k)
        if self._top_p is not None:
            logits = _keep_top_p(logits, self._top_p)
        if self._min_p is not None:
            floor = logits.amax(-1, keepdim=True) + self._min_p.log()
            logits = logits.masked_fill(logits < floor, -math.inf)
        return logits

    def _penalize(self, logits: Tensor, histories: Sequence[Tensor]) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, history in zip(seen, histories, strict=True):
            row[history] = True
        penalised = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
        return torch.where(seen, penalised, logits)

    def _apply_own(self, logits: Tensor, histories: Sequence[Tensor]) -> Tensor:
        if all(own is None for own in self._own):
            return logits
        rows = list(logits)
        for row, own in enumerate(self._own):
            if own is not None and row not in self.failures:
                try:
                    rows[row] = _checked(own(histories[row], rows[row].clone()), rows[row])
                except Exception as error:  # one sequence's processor; the others go on, and the update says so
                    self.failures[row] = error
        return torch.stack(rows)


def _checked(processed: object, like: Tensor) -> Tensor:
    if not isinstance(processed, Tensor) or processed.shape != like.shape:
        shape = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
        raise ValueError(f"a logits processor must give a tensor {list(like.shape)}, got {shape}")
    return processed.to(like)


def _bias(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Tensor | None:
    if not any(one.logit_bias for one in params):
        return None
    bias = torch.zeros(len(params), vocab_size, dtype=torch.float32)
    for row, one in zip(bias, params, strict=True):
        if one.logit_bias:
            row[list(one.logit_bias)] = torch.tensor(list(one.logit_bias.values()), dtype=torch.float32)
    return bias.to(device)


def _column_or_none(values: list[float], neutral: float, column: Callable[[list[float]], Tensor]) -> Tensor | None:
    return None if all(value == neutral for value in values) else column(values)


def _keep_top_k(logits: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """Drop what is smaller than the k-th largest; ``largest`` is the greatest k that drops anything."""
    ranked = logits.topk(largest, -1).values  # [B, largest]
    threshold = ranked.gather(1, (top_k - 1).clamp_max(largest - 1))
    return logits.masked_fill((logits < threshold) & (top_k <= largest), -math.inf)


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Drop the least probable tokens that together have at most 1 - p; never the most probable one."""
    ascending, order = logits.sort(-1)
    drop = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -math.inf)
