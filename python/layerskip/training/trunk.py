"""What a frozen model makes of texts, computed once and kept on the disk: what exits on it are trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._journal import Journal
from ..models import LayerSkipModel
from .dataset import token_batches
from .loss import IGNORE
from .output import digest

PASS_TOKENS = 4096  # of the texts that go through the model together
LOGIT_ROWS = 64  # whose logits are in memory at a time
DIGESTED = 4096  # values of a weight, to know a model again
JOURNAL = "texts.jsonl"


class Labels(NamedTuple):
    """The full model's most probable next tokens: ``ids`` [R, k] int32, falling ``probabilities`` [R, k] fp16.

    ``ids[:, 0]`` is the arg-max, the token that a greedy draft has to meet.
    """

    ids: Tensor
    probabilities: Tensor


class Text(NamedTuple):
    """One text: ``states`` [S, D] after layer E, in the model's dtype, and the labels of rows ``first`` and later.

    The last of its tokens, whose next one is not part of the text, is left out.
    """

    states: Tensor
    first: int
    labels: Labels


class Trunk:
    """The states after layer E of all tokens of some texts, and the full model's labels, in memory-mapped files.

    The model runs once, without gradients. What is computed stays: after a stop, the rest follows.

    Parameters
    ----------
    folder : Path
        Of the files; made if missing.
    exit_layer : int
        E.
    top_k : int
        k, how many tokens are kept of each distribution.
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
        if not 1 <= exit_layer < model.num_layers:
            raise ValueError(f"exit_layer must be in 1 … {model.num_layers - 1}, got {exit_layer}")
        if not 1 <= top_k <= model.vocab_size:
            raise ValueError(f"top_k must be in 1 … {model.vocab_size}, the vocabulary, got {top_k}")
        self.folder, self.exit_layer, self.top_k = folder, exit_layer, top_k
        self._model, self._pairs = model, pairs
        self._firsts = [_first_labelled(pair, index) for index, pair in enumerate(pairs)]
        self._width = model.embedding.shape[1]
        self._dtype = model.dtype
        self._work = {
            "digest of the model": model_digest(model), "dtype": str(model.dtype), "hidden size": self._width,
            "exit_layer": exit_layer, "top_k": top_k, "digest of the texts": digest(pairs),
        }  # fmt: skip
        self._places: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def rows(self, index: int) -> int:
        """How many labelled rows a text has."""
        return len(self._pairs[index]["input_ids"]) - 1 - self._firsts[index]

    def compute(self, progress: Callable[[int], None] = lambda texts: None) -> None:
        """Run the model on the texts that are not there yet; ``progress`` is told how many were added."""
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.folder / JOURNAL, self._work)
        try:
            done = {record["text"] for record in journal.records}
            progress(len(done))
            with _Files(self.folder, self._bytes_of(done)) as files:
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

    def _bytes_of(self, done: Collection[int]) -> tuple[int, int, int]:
        states = sum(len(self._pairs[index]["input_ids"]) - 1 for index in done)
        rows = sum(self.rows(index) for index in done)
        return states * self._width * self._dtype.itemsize, rows * self.top_k * 4, rows * self.top_k * 2

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

    def _labels(self, hidden: Tensor) -> Labels:
        """Of rows [R, D] after the last layer. The arg-max is the head's own, also where logits are equal."""
        ids, probabilities = [], []
        for rows in hidden.split(LOGIT_ROWS):
            logits = torch.empty(len(rows), self._model.vocab_size, device=rows.device)
            out = self._model.head(rows, logits=logits)
            logits.scatter_(1, out.token[:, None], torch.inf)
            top = logits.topk(self.top_k, dim=1)
            values = top.values.index_copy(1, torch.zeros(1, dtype=torch.int64, device=rows.device), out.logit[:, None])
            ids.append(top.indices.int().cpu())
            probabilities.append((values - out.logsumexp[:, None]).exp().half().cpu())
        return Labels(torch.cat(ids), torch.cat(probabilities))

    def _map(self, order: Sequence[int]) -> None:
        """Map the files; the texts lie in them in ``order``."""
        state_row = label_row = 0
        for index in order:
            self._places[index] = state_row, label_row
            state_row += len(self._pairs[index]["input_ids"]) - 1
            label_row += self.rows(index)
        names = _Files.NAMES
        shapes = ((state_row, self._width), (label_row, self.top_k), (label_row, self.top_k))
        dtypes = (self._dtype, torch.int32, torch.float16)
        self._states, self._ids, self._probabilities = (
            torch.from_file(str(self.folder / name), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)
            for name, shape, dtype in zip(names, shapes, dtypes, strict=True)
        )

    def __getitem__(self, index: int) -> Text:
        """A text, as views of the mapped files; after `compute`."""
        state_row, label_row = self._places[index]
        labelled = slice(label_row, label_row + self.rows(index))
        states = self._states[state_row : state_row + len(self._pairs[index]["input_ids"]) - 1]
        return Text(states, self._firsts[index], Labels(self._ids[labelled], self._probabilities[labelled]))


def model_digest(model: LayerSkipModel) -> str:
    """Of the first values of every weight: enough to tell models apart, and quick."""
    made = hashlib.sha256()
    for weight in model.parameters():
        made.update(weight.detach().flatten()[:DIGESTED].float().cpu().numpy().tobytes())
    return made.hexdigest()


class _Files:
    """The three files, open for more; what an earlier run had not finished is cut off."""

    NAMES = ("states.bin", "label_ids.bin", "label_probabilities.bin")

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._files = []
        for name, size in zip(self.NAMES, sizes, strict=True):
            path = folder / name
            if size and (not path.exists() or path.stat().st_size < size):
                raise ValueError(
                    f"{path} is shorter than the {size} bytes that {folder / JOURNAL} speaks of; remove both"
                )
            file = path.open("ab")
            file.truncate(size)
            self._files.append(file)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exception: Any) -> None:
        for file in self._files:
            file.close()

    def append(self, text: Text) -> None:
        for file, tensor in zip(self._files, (text.states, *text.labels), strict=True):
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def sync(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())


def _first_labelled(pair: Mapping[str, list[int]], index: int) -> int:
    """The first row whose next token is labelled."""
    labels = pair["labels"]
    first = next((row for row, label in enumerate(labels[1:]) if label != IGNORE), None)
    if first is None:
        raise ValueError(f"text {index} has no labelled token")
    return first
