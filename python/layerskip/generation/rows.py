"""A batch of ``generate``, row by row: what its logits processors, stopping criteria and streamer are shown.

They know a batch whose rows have the same length, and self-speculation moves the rows on at different speeds. So each
row is put before them by itself, at each of its positions, with all of its history, padding included; what does not
treat all rows alike is given the row in every place of a batch, and asked for the row's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from .options import treats_rows_alike

Scores = Callable[[int], Tensor]


class Row:
    """One sequence of the batch.

    Parameters
    ----------
    index, batch : int
        Its place, and how many there are.
    padded : Tensor [N], int64
        The prompt as ``generate`` has it.
    mask : Tensor [N], bool
        What of it is not padding.

    Attributes
    ----------
    prompt : Tensor [n], int64
        The prompt without padding.
    padding : int
        How many padding tokens are before it; -1 where there are some within.
    """

    def __init__(self, index: int, batch: int, padded: Tensor, mask: Tensor) -> None:
        self.index, self.batch, self.padded = index, batch, padded
        self.prompt = padded[mask]
        self.length = len(self.prompt)
        first = int(mask.int().argmax())
        self.padding = first if first + self.length == len(padded) else -1

    def over_batch(self, row: Tensor) -> Tensor:
        """``row`` [n] in every place of the batch, [B, n]."""
        return row[None].expand(self.batch, -1)

    def history(self, tokens: Tensor) -> Tensor:
        """All tokens [n] as ``generate`` would have them, of the unpadded ones and what follows."""
        return torch.cat([self.padded, tokens[self.length :].to(self.padded.device)])


def rows_of(input_ids: Tensor, mask: Tensor) -> list[Row]:
    """The rows of prompts [B, N] with the boolean attention mask ``mask`` [B, N].

    Raises
    ------
    ValueError
        If the last token of a row is masked.
    """
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    if not bool(mask[:, -1].all()):
        raise ValueError("attention_mask ends in 0: prompts of different lengths must be padded on the left")
    batch = len(input_ids)
    return [Row(index, batch, input_ids[index], mask[index]) for index in range(batch)]


class Kept(NamedTuple):
    """Raw logits and processed scores of a position, [V]; or of a step, [B, V]."""

    logits: Tensor
    scores: Tensor


class RowProcessor:
    """The logits processors for one row, as the decoder takes them; with ``keep`` they remember what they saw and gave.

    Parameters
    ----------
    row : Row
    processors : sequence of callable
        ``(ids [B, n], scores [B, V]) -> scores [B, V]``.
    keep : bool

    Attributes
    ----------
    kept : dict of int to Kept
        By the number of new tokens before. A position that was drafted and rejected is
        overwritten by the round that emits it, since verification comes after drafting.
    """

    def __init__(self, row: Row, processors: Sequence[Callable[..., Tensor]], keep: bool) -> None:
        self._row, self._processors, self._keep = row, processors, keep
        self.kept: dict[int, Kept] = {}

    def __call__(self, history: Tensor, logits: Tensor) -> Tensor:
        """Processed logits [V] of the position after ``history`` [n]."""
        row, ids = self._row, self._row.history(history)
        logits = scores = logits.to(ids.device)
        for processor in self._processors:
            if row.batch == 1 or treats_rows_alike(processor):
                scores = processor(ids[None], scores[None].clone())[0]
            else:
                scores = processor(row.over_batch(ids).clone(), row.over_batch(scores).clone())[row.index]
        if self._keep:
            self.kept[len(history) - row.length] = Kept(logits.clone(), scores.clone())
        return scores


class Endings:
    """Where the rows of a batch end, as ``generate`` has it.

    A row ends with the first token for which a criterion says so. Where no EOS token is among the criteria, a row that
    ended goes on all the same until the last one has ended.

    Parameters
    ----------
    criteria : StoppingCriteriaList
        Without those on length and EOS.
    eos : frozenset of int
    together : bool
        Whether the rows go on until all have ended.
    batch : int
    """

    def __init__(self, criteria: Sequence[Any], eos: frozenset[int], together: bool, batch: int) -> None:
        self._criteria, self._eos = StoppingCriteriaList(criteria), eos
        self.together = together
        self._ends: list[int | None] = [None] * batch

    def reached(self, row: Row, tokens: list[int], scores: Scores | None = None) -> bool:
        """Whether ``row`` may stop after the last of its new ``tokens``; ``scores`` gives the processed ones [V]."""
        if self._ends[row.index] is None and self._ends_with(row, tokens, scores):
            self._ends[row.index] = len(tokens)
        ends = [end for end in self._ends if end is not None]
        if self.together:
            return len(ends) == row.batch and len(tokens) >= max(ends)
        return self._ends[row.index] is not None

    def steps(self, counts: Sequence[int]) -> int:
        """How many new tokens the batch has, from how many each row has."""
        ends = [end for end in self._ends if end is not None]
        return max(ends) if self.together and len(ends) == len(self._ends) else max(counts)

    def _ends_with(self, row: Row, tokens: list[int], scores: Scores | None) -> bool:
        if tokens[-1] in self._eos:
            return True
        if not self._criteria:
            return False
        ids = torch.cat([row.padded, torch.tensor(tokens, dtype=torch.int64, device=row.padded.device)])
        shown = None if scores is None else tuple(row.over_batch(scores(step)) for step in range(len(tokens)))
        ended = self._criteria(row.over_batch(ids).clone(), shown)
        return bool(ended[row.index])


class Columns:
    """The tokens [B] of all rows, step by step, as transformers' streamers take them; padding where a row has ended.

    Parameters
    ----------
    streamer : BaseStreamer
    batch : int
    pad : int
    """

    def __init__(self, streamer: Any, batch: int, pad: int) -> None:
        self._streamer, self._pad = streamer, pad
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        self._ended = [False] * batch
        self._given = 0

    def add(self, index: int, token: int, ended: bool) -> None:
        """A new token of row ``index``, and whether it is the last."""
        self._rows[index].append(token)
        self._ended[index] = ended
        while self._ready():
            column = [row[self._given] if self._given < len(row) else self._pad for row in self._rows]
            self._streamer.put(torch.tensor(column))
            self._given += 1

    def _ready(self) -> bool:
        known = [len(row) > self._given for row in self._rows]
        return any(known) and all(here or ended for here, ended in zip(known, self._ended, strict=True))
