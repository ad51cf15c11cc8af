"""Cached hidden states and teacher top-k of a frozen model, on disk."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .._files import Journal
from ..models import LayerSkipModel, SharedKVCache
from .batching import token_batches
from .losses import IGNORE
from .output_dir import digest

LOGIT_ROWS = 64  # whose logits are in memory at a time
DIGESTED = 4096  # values of a weight, to know a model again
JOURNAL = "texts.jsonl"
T = TypeVar("T")
LABELS = ("label_ids.bin", "label_probabilities.bin")


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The part of ``items`` that this process works on."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


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


class KeptTexts:
    """Texts whose states after layer E and labels lie in memory-mapped files of a folder.

    A subclass makes them, and knows the tokens of each text. What is computed stays: after a stop, the rest follows.
    Labels are the full model's, so they serve every E: for another one, only layers [0, E) run over what is there.

    Parameters
    ----------
    folder : Path
        Of the files; made if missing.
    model : LayerSkipModel
    exit_layer : int
        E.
    top_k : int
        k, how many tokens are kept of each distribution.
    work : mapping
        What else the texts depend on.
    """

    def __init__(
        self, folder: Path, model: LayerSkipModel, exit_layer: int, top_k: int, work: Mapping[str, Any]
    ) -> None:
        if not 1 <= exit_layer < model.num_layers:
            raise ValueError(f"exit_layer must be in 1 … {model.num_layers - 1}, got {exit_layer}")
        if not 1 <= top_k <= model.vocab_size:
            raise ValueError(f"top_k must be in 1 … {model.vocab_size}, the vocabulary, got {top_k}")
        self.folder, self.exit_layer, self.top_k = folder, exit_layer, top_k
        self._model = model
        self._width, self._dtype = model.embedding.shape[1], model.dtype
        self._work = {
            "digest of the model": model_digest(model), "dtype": str(model.dtype), "hidden size": self._width,
            "top_k": top_k, **work,
        }  # fmt: skip
        self._records: dict[int, dict[str, Any]] = {}
        self._places: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def _inputs(self, index: int) -> list[int]:
        """The tokens of a text that have states: all but the last."""
        raise NotImplementedError

    def _num_states(self, index: int) -> int:
        return len(self._inputs(index))

    def _first(self, index: int) -> int:
        """The first labelled row of a text; all after it are."""
        raise NotImplementedError

    def _batches(self) -> Iterator[list[int]]:
        """Texts that go through the model together, until none is left that ``_records`` lacks."""
        raise NotImplementedError

    def _make(self, indices: Sequence[int]) -> list[tuple[dict[str, Any], Text]]:
        """Those of some texts that ``_records`` lacks, each with its record."""
        raise NotImplementedError

    def _learn(self, journal: Journal | None) -> None:
        """Take notice of what is there; only the first process has the journal."""
        (records,) = broadcast_object_list([[] if journal is None else journal.records])
        self._records = {record["text"]: record for record in records}

    def compute(self, progress: Callable[[int], None] = lambda texts: None) -> None:
        """Make the texts that are not there yet: each process its share, and the first one writes them.

        There, ``progress`` is told how many were added.
        """
        journal = self._journal() if PartialState().is_main_process else None
        try:
            self._learn(journal)
            made = self._made()
            if journal is not None:
                self._append(journal, made, progress)
            else:
                for _ in made:
                    pass  # the first process writes them
            self._learn(journal)
        finally:
            if journal is not None:
                journal.close()
        self._map(list(self._records))

    def _made(self) -> Iterator[list[tuple[dict[str, Any], Text]]]:
        """The texts of all batches in their order, for all processes; each process makes its share."""
        batches = iter(self._batches())
        while turn := list(islice(batches, PartialState().num_processes)):
            yield from gather_object([self._make(batch) for batch in own_share(turn)])

    def _append(
        self, journal: Journal, made: Iterable[list[tuple[dict[str, Any], Text]]], progress: Callable[[int], None]
    ) -> None:
        known = list(self._records)
        with self._open(known) as files:
            progress(sum(index < len(self) for index in known[: files.num_texts]))
            for index in known[files.num_texts :]:
                files.append_states(self._states_of(index))
                progress(int(index < len(self)))
            files.sync()
            for part in made:
                for _, text in part:
                    files.append(text)
                files.sync()  # before the journal says that they are there
                for record, _ in part:
                    journal.append(record)
                progress(len(part))

    @torch.inference_mode()
    def _states_of(self, index: int) -> Tensor:
        """The states [S, D] after layer E of a text that is there."""
        decoder, ids = self._model.decoder, torch.tensor([self._inputs(index)], device=self._model.device)
        cache = decoder.new_cache(*ids.shape)
        return decoder.prefill(self._model.embed(ids), cache, 0, self.exit_layer)[0].cpu()

    def rows(self, index: int) -> int:
        """How many labelled rows a text has."""
        return self._num_states(index) - self._first(index)

    def __getitem__(self, index: int) -> Text:
        """A text, as views of the mapped files, which must be there."""
        state_row, label_row = self._places[index]
        labelled = slice(label_row, label_row + self.rows(index))
        states = self._states[state_row : state_row + self._num_states(index)]
        return Text(states, self._first(index), Labels(self._ids[labelled], self._probabilities[labelled]))

    def _journal(self) -> Journal:
        """Which texts are in the files, in their order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Journal(self.folder / JOURNAL, self._work)

    def _open(self, done: Sequence[int]) -> Files:
        """The files, which hold the labels of these texts, for more."""
        rows = sum(map(self.rows, done)) * self.top_k
        states = [self._num_states(index) * self._width * self._dtype.itemsize for index in done]
        return Files(self.folder, self.exit_layer, states, (rows * 4, rows * 2))

    def _map(self, order: Sequence[int]) -> None:
        """Map the files; the texts lie in them in ``order``."""
        state_row = label_row = 0
        for index in order:
            self._places[index] = state_row, label_row
            state_row += self._num_states(index)
            label_row += self.rows(index)
        shapes = ((state_row, self._width), (label_row, self.top_k), (label_row, self.top_k))
        dtypes = (self._dtype, torch.int32, torch.float16)
        self._states, self._ids, self._probabilities = (
            torch.from_file(str(self.folder / name), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)
            for name, shape, dtype in zip((states_file(self.exit_layer), *LABELS), shapes, dtypes, strict=True)
        )

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


def model_digest(model: LayerSkipModel) -> str:
    """Of the first values of every weight: enough to tell models apart, and quick."""
    made = hashlib.sha256()
    for weight in model.parameters():
        made.update(weight.detach().flatten()[:DIGESTED].float().cpu().numpy().tobytes())
    return made.hexdigest()


def states_file(exit_layer: int) -> str:
    """The name of the file of states after layer E."""
    return f"states-{exit_layer}.bin"


class Files:
    """The files of states after a layer and of labels, open for more; what a run had not finished is cut off.

    Parameters
    ----------
    folder : Path
    exit_layer : int
        E.
    states, labels : sequence of int
        The bytes of each text's states, in the order of the texts, and of each file of labels.

    Attributes
    ----------
    num_texts : int
        How many of these texts, the first ones, have their states after layer E there.
    """

    def __init__(self, folder: Path, exit_layer: int, states: Sequence[int], labels: Sequence[int]) -> None:
        self._files: list[BinaryIO] = []
        for name, size in zip(LABELS, labels, strict=True):
            path = folder / name
            if _size(path) < size:
                raise ValueError(
                    f"{path} is shorter than the {size} bytes that {folder / JOURNAL} speaks of; remove both"
                )
            self._open(path, size)
        path = folder / states_file(exit_layer)
        ends = list(accumulate(states, initial=0))
        self.num_texts = bisect_right(ends, _size(path)) - 1
        self._open(path, ends[self.num_texts])
        *self._labels, self._states = self._files

    def _open(self, path: Path, size: int) -> None:
        self._files.append(file := path.open("ab"))
        file.truncate(size)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *exception: Any) -> None:
        for file in self._files:
            file.close()

    def append(self, text: Text) -> None:
        """Write a text behind the others."""
        self.append_states(text.states)
        for file, tensor in zip(self._labels, text.labels, strict=True):
            _write(file, tensor)

    def append_states(self, states: Tensor) -> None:
        """Write the states of a text whose labels are there behind those of the texts before it."""
        _write(self._states, states)

    def sync(self) -> None:
        """Return when all is on the disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(torch.uint8).numpy().data)


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
