"""Texts that the model writes itself, with what it makes of them: states and labels are kept while it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._journal import Journal
from ..models import LayerSkipModel, SharedKVCache
from .kept import KeptTexts, Labels, Text
from .output import digest

BATCH = 32  # texts that are written at once
SORTED = 8  # batches whose prompts are sorted by length together


class WrittenTexts(KeptTexts):
    """Prompts, and what the model writes after them with all its layers, greedily.

    A `Trunk` of the same texts would hold the same, but for rounding, and cost a second pass over every token.

    Parameters
    ----------
    folder, model, exit_layer, top_k
        See `KeptTexts`.
    prompts : sequence of sequences of int
        Token ids; none is empty.
    count : int
        How many of them are continued, the first ones. Another number goes on with what is there.
    max_new_tokens : int
    eos_token_id : int
        Ends a text.
    whole : bool
        Whether the rows of the prompts are labelled, too.

    Raises
    ------
    ValueError
        If other prompts or another model made what is in ``folder``, or a prompt has no token.
    """

    def __init__(
        self,
        folder: Path,
        model: LayerSkipModel,
        exit_layer: int,
        top_k: int,
        prompts: Sequence[Sequence[int]],
        count: int,
        max_new_tokens: int,
        eos_token_id: int,
        whole: bool = False,
    ) -> None:
        pairs = [{"input_ids": list(prompt), "labels": []} for prompt in prompts]
        work = {"digest of the prompts": digest(pairs), "new tokens": max_new_tokens, "whole": whole}
        super().__init__(folder, model, exit_layer, top_k, work)
        empty = next((index for index, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise ValueError(f"prompt {empty} has no token")
        self._prompts, self._count, self._whole = prompts, min(count, len(prompts)), whole
        self._most, self._eos = max_new_tokens, eos_token_id
        self.tokens: dict[int, list[int]] = {}
        """What was written, by the index of its prompt."""

    def __len__(self) -> int:
        return self._count

    def _inputs(self, index: int) -> list[int]:
        return [*self._prompts[index], *self.tokens[index][:-1]]

    def _first(self, index: int) -> int:
        return 0 if self._whole else len(self._prompts[index]) - 1

    def _learn(self, journal: Journal | None) -> None:
        super()._learn(journal)
        self.tokens = {index: record["tokens"] for index, record in self._records.items()}

    def _batches(self) -> Iterator[list[int]]:
        """Prompts of like length together."""
        missing = [index for index in range(self._count) if index not in self._records]
        for begin in range(0, len(missing), BATCH * SORTED):
            near = sorted(missing[begin : begin + BATCH * SORTED], key=lambda index: len(self._prompts[index]))
            yield from (near[first : first + BATCH] for first in range(0, len(near), BATCH))

    def _make(self, indices: Sequence[int]) -> list[tuple[dict[str, Any], Text]]:
        texts = self._write(indices)
        return [
            ({"text": index, "tokens": self.tokens[index]}, text) for index, text in zip(indices, texts, strict=True)
        ]

    @torch.inference_mode()
    def _write(self, indices: Sequence[int]) -> list[Text]:
        """Continue some prompts together, to the end of the last of them."""
        lengths = [len(self._prompts[index]) for index in indices]
        cache = self._model.decoder.new_cache(len(indices), max(lengths) + self._most)
        states, labels = self._read(indices, cache)
        lens = torch.tensor(lengths, device=self._model.device)
        token = torch.tensor([int(one.ids[-1, 0]) for (one,) in labels], device=self._model.device)
        written: list[list[int]] = [[] for _ in indices]
        running = list(range(len(indices)))
        while True:
            for row, one in zip(running, token.tolist(), strict=True):
                written[row].append(one)
            goes_on = [row for row in running if written[row][-1] != self._eos and len(written[row]) < self._most]
            if not goes_on:
                break
            token, running = token[torch.tensor([row in goes_on for row in running])], goes_on
            slots = torch.tensor(running, device=self._model.device)
            state, made = self._step(token, cache, lens[slots], slots)
            lens[slots] += 1
            token = made.ids[:, 0].long().to(token.device)
            for place, row in enumerate(running):
                states[row].append(state[place].cpu())
                labels[row].append(Labels(*(part[place : place + 1] for part in made)))
        self.tokens.update(zip(indices, written, strict=True))
        return [
            Text(torch.cat(states[row]), self._first(index), Labels(*map(torch.cat, zip(*labels[row], strict=True))))
            for row, index in enumerate(indices)
        ]

    def _read(self, indices: Sequence[int], cache: SharedKVCache) -> tuple[list[list[Tensor]], list[list[Labels]]]:
        """The prompts through the model, padded behind their ends, where their continuations will be written."""
        model, prompts = self._model, [self._prompts[index] for index in indices]
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        hidden = model.decoder.prefill(model.embed(ids.to(model.device)), cache, 0, self.exit_layer)
        final = model.decoder.prefill(hidden, cache, self.exit_layer)
        states = [[hidden[row, : len(prompt)].cpu()] for row, prompt in enumerate(prompts)]
        labels = [
            [self._labels(final[row, self._first(index) : len(prompt)])]
            for row, (index, prompt) in enumerate(zip(indices, prompts, strict=True))
        ]
        return states, labels

    def _step(self, token: Tensor, cache: SharedKVCache, lens: Tensor, slots: Tensor) -> tuple[Tensor, Labels]:
        """One token of each running text through the model: states [B, 1, D] after layer E, and labels."""
        model = self._model
        state = model.decoder.forward(model.embed(token[:, None]), cache, 0, self.exit_layer, lens, slots)
        final = model.decoder.forward(state, cache, self.exit_layer, None, lens, slots)
        return state, self._labels(final[:, 0])
