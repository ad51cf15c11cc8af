"""A view of a ``generate`` batch row by row, for its logits processors, stopping criteria and streamer.

They expect rows of the same length, but with self-speculation each row advances at its own speed. So they are called
for one row at a time, at each of its positions, with its whole history, padding included. A processor that does not
treat all rows alike gets a batch that has the row in every place, and only the result in the row's own place is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from .compatibility import treats_rows_alike

ScoresAt = Callable[[int], Tensor]
"""(number of new tokens before a position) -> its processed scores [V]."""


class BatchRow:
    """One row of the batch: a prompt, its padding and its place.

    Parameters
    ----------
    index, batch : int
        Its place, and the number of rows.
    padded : Tensor [N], int64
        The prompt with padding, as ``generate`` has it.
    mask : Tensor [N], bool
        False for padding.

    Attributes
    ----------
    prompt : Tensor [n], int64
        The prompt without padding.
    padding : int
        How many padding tokens are before the prompt; -1 if there is padding inside it.
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
        """The tokens [n] of the row with its padding, from its tokens without."""
        return torch.cat([self.padded, tokens[self.length :].to(self.padded.device)])


def rows_of(input_ids: Tensor, mask: Tensor) -> list[BatchRow]:
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
    return [BatchRow(index, batch, input_ids[index], mask[index]) for index in range(batch)]


class Scores(NamedTuple):
    """Raw logits and processed scores: [V] of a position, or [B, V] of a step."""

    logits: Tensor
    scores: Tensor


class RowProcessor:
    """The logits processors of one row, as one function that the decoder calls.

    Parameters
    ----------
    row : BatchRow
    processors : sequence of callable
        ``(ids [B, n], scores [B, V]) -> scores [B, V]``.
    keep : bool
        Whether to keep logits and scores.

    Attributes
    ----------
    kept : dict of int to Scores
        By the number of new tokens before the position. Those of a draft that was rejected are overwritten when the
        position is verified.
    """

    def __init__(self, row: BatchRow, processors: Sequence[Callable[..., Tensor]], keep: bool) -> None:
        self._row, self._processors, self._keep = row, processors, keep
        self.kept: dict[int, Scores] = {}

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
            self.kept[len(history) - row.length] = Scores(logits.clone(), scores.clone())
        return scores


class BatchStopping:
    """Where the rows of a batch end, as in ``generate``.

    A row ends with the first token for which a criterion says so. But if no EOS token is among the criteria, a row that
    has ended goes on until all rows have ended.

    Parameters
    ----------
    criteria : StoppingCriteriaList
        Without those for length and EOS.
    eos : frozenset of int
    together : bool
        Whether the rows go on until all have ended.
    batch : int
    """

    def __init__(self, criteria: Sequence[Any], eos: frozenset[int], together: bool, batch: int) -> None:
        self._criteria, self._eos = StoppingCriteriaList(criteria), eos
        self.together = together
        self._ends: list[int | None] = [None] * batch

    def reached(self, row: BatchRow, tokens: list[int], scores: ScoresAt | None = None) -> bool:
        """Whether ``row`` may stop after its new ``tokens``; ``scores`` gives the processed scores."""
        if self._ends[row.index] is None and self._ends_with(row, tokens, scores):
            self._ends[row.index] = len(tokens)
        ends = [end for end in self._ends if end is not None]
        if self.together:
            return len(ends) == row.batch and len(tokens) >= max(ends)
        return self._ends[row.index] is not None

    def steps(self, counts: Sequence[int]) -> int:
        """How many new tokens the batch has, if ``counts`` are those of its rows."""
        ends = [end for end in self._ends if end is not None]
        return max(ends) if self.together and len(ends) == len(self._ends) else max(counts)

    def _ends_with(self, row: BatchRow, tokens: list[int], scores: ScoresAt | None) -> bool:
        if tokens[-1] in self._eos:
            return True
        if not self._criteria:
            return False
        ids = torch.cat([row.padded, torch.tensor(tokens, dtype=torch.int64, device=row.padded.device)])
        shown = None if scores is None else tuple(row.over_batch(scores(step)) for step in range(len(tokens)))
        ended = self._criteria(row.over_batch(ids).clone(), shown)
        return bool(ended[row.index])


class ColumnStreamer:
    """Gives a streamer of transformers the tokens [B] of each step when all rows have them; padding for ended rows.

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
        """Add a token to row ``index``; ``ended`` says whether it is the last one."""
        self._rows[index].append(token)
        self._ended[index] = ended
        while self._ready():
            column = [row[self._given] if self._given < len(row) else self._pad for row in self._rows]
            self._streamer.put(torch.tensor(column))
            self._given += 1

    def _ready(self) -> bool:
        known = [len(row) > self._given for row in self._rows]
        return any(known) and all(here or ended for here, ended in zip(known, self._ended, strict=True))
