"""What a frozen model makes of texts, computed once and kept on the disk: what exits on it are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import LayerSkipModel
from .dataset import token_batches
from .kept import KeptTexts, Text
from .loss import IGNORE
from .output import digest

PASS_TOKENS = 4096  # of the texts that go through the model together


class Trunk(KeptTexts):
    """The states after layer E of all tokens of some texts, and the full model's labels, in memory-mapped files.

    The model runs once, without gradients; for another E, its layers [0, E) run again.

    Parameters
    ----------
    folder, model, exit_layer, top_k
        See `KeptTexts`.
    pairs : sequence of mapping
        Texts with ``input_ids`` and ``labels`` as `layerskip.training.encode` makes them. A row whose next token is
        labelled gets the model's own label; the rows of a text that have one are its last.

    Raises
    ------
    ValueError
        If other texts, another model or another k made what is in ``folder``, or a text has no labelled row.
    """

    def __init__(
        self,
        folder: Path,
        model: LayerSkipModel,
        exit_layer: int,
        top_k: int,
        pairs: Sequence[Mapping[str, list[int]]],
    ) -> None:
        super().__init__(folder, model, exit_layer, top_k, {"digest of the texts": digest(pairs)})
        self._pairs = pairs
        self._firsts = [_first_labelled(pair, index) for index, pair in enumerate(pairs)]

    def __len__(self) -> int:
        return len(self._pairs)

    def _inputs(self, index: int) -> list[int]:
        return self._pairs[index]["input_ids"][:-1]

    def _first(self, index: int) -> int:
        return self._firsts[index]

    def _batches(self) -> Iterator[list[int]]:
        lengths = [len(pair["input_ids"]) for pair in self._pairs]
        for batch in token_batches(lengths, PASS_TOKENS, range(len(self))):  # the same after a stop
            if any(index not in self._records for index in batch):
                yield batch

    def _make(self, indices: Sequence[int]) -> list[tuple[dict[str, Any], Text]]:
        texts = zip(indices, self._run(indices), strict=True)
        return [({"text": index}, text) for index, text in texts if index not in self._records]

    @torch.inference_mode()
    def _run(self, indices: Sequence[int]) -> list[Text]:
        """Some texts through the model, padded behind their ends, where no row of theirs sees."""
        model, lengths = self._model, [len(self._pairs[index]["input_ids"]) - 1 for index in indices]
        ids = torch.zeros(len(indices), max(lengths), dtype=torch.int64)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            ids[row, :length] = torch.tensor(self._pairs[index]["input_ids"][:length])
        cache = model.decoder.new_cache(*ids.shape)
        states = model.decoder.prefill(model.embed(ids.to(model.device)), cache, 0, self.exit_layer)
        final = model.decoder.prefill(states, cache, self.exit_layer)
        return [
            Text(
                states[row, :length].clone().cpu(), first := self._firsts[index], self._labels(final[row, first:length])
            )
            for row, (index, length) in enumerate(zip(indices, lengths, strict=True))
        ]


def _first_labelled(pair: Mapping[str, list[int]], index: int) -> int:
    """The first row whose next token is labelled."""
    labels = pair["labels"]
    first = next((row for row, label in enumerate(labels[1:]) if label != IGNORE), None)
    if first is None:
        raise ValueError(f"text {index} has no labelled token")
    return first
