"""What a frozen model makes of texts, computed once and kept on the disk: what exits on it are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..models import LayerSkipModel
from .dataset import token_batches
from .kept import KeptTexts, Text
from .loss import IGNORE
from .output import digest

PASS_TOKENS = 4096  # of the texts that go through the model together


class Trunk(KeptTexts):
    """The states after layer E of all tokens of some texts, and the full model's labels, in memory-mapped files.

    The model runs once, without gradients.

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
        If other texts, another model or another E or k made what is in ``folder``, or a text has no labelled row.
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

    def _num_states(self, index: int) -> int:
        return len(self._pairs[index]["input_ids"]) - 1

    def _first(self, index: int) -> int:
        return self._firsts[index]

    def compute(self, progress: Callable[[int], None] = lambda texts: None) -> None:
        """Run the model on the texts that are not there yet; ``progress`` is told how many were added."""
        journal = self._journal()
        try:
            done = {record["text"] for record in journal.records}
            progress(len(done))
            with self._open(done) as files:
                lengths = [len(pair["input_ids"]) for pair in self._pairs]
                for batch in token_batches(lengths, PASS_TOKENS, range(len(self))):  # the same after a stop
                    missing = [index for index in batch if index not in done]
                    if not missing:
                        continue
                    for index, text in zip(batch, self._run(batch), strict=True):
                        if index in missing:
                            files.append(text)
                    files.sync()  # before the journal says that they are there
                    for index in missing:
                        journal.append({"text": index})
                    progress(len(missing))
            self._map([record["text"] for record in journal.records])
        finally:
            journal.close()

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
            Text(states[row, :length].cpu(), first := self._firsts[index], self._labels(final[row, first:length]))
            for row, (index, length) in enumerate(zip(indices, lengths, strict=True))
        ]


def _first_labelled(pair: Mapping[str, list[int]], index: int) -> int:
    """The first row whose next token is labelled."""
    labels = pair["labels"]
    first = next((row for row, label in enumerate(labels[1:]) if label != IGNORE), None)
    if first is None:
        raise ValueError(f"text {index} has no labelled token")
    return first
