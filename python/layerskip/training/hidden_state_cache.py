"""Cached hidden states and teacher top-k of a frozen model, on disk."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .._files import Journal
from ..models import LayerSkipModel, SharedKVCache
from ..models.files import digest_of_weights
from .batching import token_batches
from .losses import IGNORE
from .output_dir import ADDED, WEIGHTS, digest

LOGIT_ROWS = 64  # rows of logits in memory at a time
DIGESTED = 4096  # values of each weight in the digest of a model that older versions recorded
JOURNAL = "texts.jsonl"
TOP_K_FILES = ("label_ids.bin", "label_probabilities.bin")
PASS_TOKENS = 4096  # padded tokens of the texts that go through the model together
BATCH = 32  # texts that are generated together
SORTED = 8  # batches whose prompts are sorted by length together
T = TypeVar("T")


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The part of ``items`` that this process works on."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


class TopK(NamedTuple):
    """The most probable next tokens of the full model: ``ids`` [R, k] int32, falling ``probabilities`` [R, k] fp16.

    ``ids[:, 0]`` is the arg-max, the token that a greedy draft has to match.
    """

    ids: Tensor
    probabilities: Tensor


class CachedText(NamedTuple):
    """One text: ``states`` [S, D] after layer E, in the dtype of the model, and top-k of the rows from ``first`` on.

    The last token of the text has no row: its next token is not part of the text.
    """

    states: Tensor
    first: int
    top_k: TopK


class HiddenStateCache:
    """Hidden states after layer E and teacher top-k of texts, in memory-mapped files of a folder.

    A subclass computes them and knows the tokens of each text. A stopped computation is resumed. The top-k serve every
    E: for another one, only layers [0, E) run over the texts. ``work`` is what else the texts depend on, ``digests``
    the `model_digests`, if they are known. `compute` raises ValueError if the folder was made from other work, another
    model or another k.
    """

    def __init__(
        self,
        folder: Path,
        model: LayerSkipModel,
        exit_layer: int,
        top_k: int,
        work: Mapping[str, Any],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        if not 1 <= exit_layer < model.num_layers:
            raise ValueError(f"exit_layer must be in 1 … {model.num_layers - 1}, got {exit_layer}")
        if not 1 <= top_k <= model.vocab_size:
            raise ValueError(f"top_k must be in 1 … {model.vocab_size}, the vocabulary, got {top_k}")
        self.folder, self.exit_layer, self.top_k = folder, exit_layer, top_k
        self._model = model
        self._width, self._dtype = model.embedding.shape[1], model.dtype
        self._work = {
            **(digests or model_digests(model)), "dtype": str(model.dtype), "hidden size": self._width, "top_k": top_k,
            **work,
        }  # fmt: skip
        self._records: dict[int, dict[str, Any]] = {}  # by text, in the order of the files
        self._places: dict[int, tuple[int, int]] = {}
        self._paths = [folder / name for name in (*TOP_K_FILES, f"states-{exit_layer}.bin")]

    def __len__(self) -> int:
        raise NotImplementedError

    def _inputs(self, index: int) -> list[int]:
        """The tokens of a text that have rows: all but the last."""
        raise NotImplementedError

    def _first(self, index: int) -> int:
        """The first row of a text with top-k; all after it have them, too."""
        raise NotImplementedError

    def _batches(self) -> Iterator[list[int]]:
        """Texts that go through the model together, until ``_records`` has all of them."""
        raise NotImplementedError

    def _compute(self, indices: Sequence[int]) -> list[tuple[dict[str, Any], CachedText]]:
        """The texts among ``indices`` that ``_records`` lacks, each with its record."""
        raise NotImplementedError

    def compute(self, progress: Callable[[int], None] = lambda texts: None) -> None:
        """Compute the missing texts: each process its share; the first one writes, and reports the number added."""
        journal = None
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            journal = Journal(self.folder / JOURNAL, self._work, added=ADDED)
        try:
            if journal is not None and journal.torn:  # the places of all texts follow from the records
                raise ValueError(f"{journal.path} has lines that cannot be read; remove {self.folder}")
            self._read(journal)
            batches = self._computed()
            if journal is not None:
                self._append(journal, batches, progress)
            else:
                for _ in batches:
                    pass  # the first process writes them
            self._read(journal)
        finally:
            if journal is not None:
                journal.close()
        self._map()

    def _read(self, journal: Journal | None) -> None:
        """Read the records; only the first process has the journal."""
        (records,) = broadcast_object_list([[] if journal is None else journal.records])
        self._records = {record["text"]: record for record in records}

    def _computed(self) -> Iterator[list[tuple[dict[str, Any], CachedText]]]:
        """The texts of all batches in order, in all processes; each process computes its share."""
        batches = iter(self._batches())
        while turn := list(islice(batches, PartialState().num_processes)):
            yield from gather_object([self._compute(batch) for batch in own_share(turn)])

    def _append(
        self,
        journal: Journal,
        batches: Iterable[list[tuple[dict[str, Any], CachedText]]],
        progress: Callable[[int], None],
    ) -> None:
        """Append the missing states and texts to the files; cut off what a stopped run left unfinished."""
        known = list(self._records)
        values = sum(map(self.rows, known)) * self.top_k
        ends = list(accumulate((len(self._inputs(i)) * self._width * self._dtype.itemsize for i in known), initial=0))
        for path, size in zip(self._paths, (values * 4, values * 2), strict=False):
            if _size(path) < size:
                raise ValueError(f"{path} is shorter than the {size} bytes that {journal.path} lists; remove both")
        num_texts = bisect_right(ends, _size(self._paths[-1])) - 1  # with states after this layer
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("ab")) for path in self._paths]
            for file, size in zip(files, (values * 4, values * 2, ends[num_texts]), strict=True):
                file.truncate(size)
            progress(sum(index < len(self) for index in known[:num_texts]))
            for index in known[num_texts:]:
                _write(files[-1], self._states_of(index))
                progress(int(index < len(self)))
            _sync(files)
            for batch in batches:
                for _, text in batch:
                    for file, tensor in zip(files, (*text.top_k, text.states), strict=True):
                        _write(file, tensor)
                _sync(files)  # before the journal lists them
                for record, _ in batch:
                    journal.append(record)
                progress(len(batch))

    @torch.inference_mode()
    def _states_of(self, index: int) -> Tensor:
        """Hidden states [S, D] after layer E of a text that has top-k."""
        decoder, ids = self._model.decoder, torch.tensor([self._inputs(index)], device=self._model.device)
        cache = decoder.new_cache(*ids.shape)
        return decoder.prefill(self._model.embed(ids), cache, 0, self.exit_layer)[0].cpu()

    def rows(self, index: int) -> int:
        """The number of rows of a text with top-k."""
        return len(self._inputs(index)) - self._first(index)

    def __getitem__(self, index: int) -> CachedText:
        """A computed text, as views of the mapped files."""
        state_row, top_k_row = self._places[index]
        rows = slice(top_k_row, top_k_row + self.rows(index))
        states = self._states[state_row : state_row + len(self._inputs(index))]
        return CachedText(states, self._first(index), TopK(self._ids[rows], self._probabilities[rows]))

    def _map(self) -> None:
        state_row = top_k_row = 0
        for index in self._records:
            self._places[index] = state_row, top_k_row
            state_row += len(self._inputs(index))
            top_k_row += self.rows(index)
        shapes = ((top_k_row, self.top_k), (top_k_row, self.top_k), (state_row, self._width))
        self._ids, self._probabilities, self._states = (
            torch.from_file(str(path), shared=False, size=shape[0] * shape[1], dtype=dtype).view(shape)
            for path, shape, dtype in zip(self._paths, shapes, (torch.int32, torch.float16, self._dtype), strict=True)
        )

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: SharedKVCache) -> tuple[Tensor, Tensor]:
        """Hidden states [B, S, D] after layer E and after the last layer, padded on the right."""
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        decoder = self._model.decoder
        states = decoder.prefill(self._model.embed(ids.to(self._model.device)), cache, 0, self.exit_layer)
        return states, decoder.prefill(states, cache, self.exit_layer)

    def _top_k(self, hidden: Tensor) -> TopK:
        """Top-k of rows [R, D] after the last layer. The arg-max is the head's own, also where logits are equal."""
        ids, probabilities = [], []
        for rows in hidden.split(LOGIT_ROWS):
            logits = torch.empty(len(rows), self._model.vocab_size, device=rows.device)
            out = self._model.head(rows, logits=logits)
            logits.scatter_(1, out.token[:, None], torch.inf)
            top = logits.topk(self.top_k, dim=1)
            values = top.values.index_copy(1, torch.zeros(1, dtype=torch.int64, device=rows.device), out.logit[:, None])
            ids.append(top.indices.int().cpu())
            probabilities.append((values - out.logsumexp[:, None]).exp().half().cpu())
        return TopK(torch.cat(ids), torch.cat(probabilities))


def model_digests(model: LayerSkipModel) -> dict[str, str]:
    """Digest of all weights, and of the first values of each, which is all that older versions recorded."""
    sha256 = hashlib.sha256()
    for weight in model.parameters():
        sha256.update(weight.detach().flatten()[:DIGESTED].float().cpu().numpy().tobytes())
    return {"digest of the model": sha256.hexdigest(), WEIGHTS: digest_of_weights(model)}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _sync(files: Sequence[BinaryIO]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


class TextCache(HiddenStateCache):
    """Cached hidden states and top-k of given texts.

    ``pairs`` have ``input_ids`` and ``labels`` as `layerskip.training.encode` makes them. The rows of a text whose next
    token is labelled, which are its last, get top-k; ValueError if a text has none.
    """

    def __init__(
        self,
        folder: Path,
        model: LayerSkipModel,
        exit_layer: int,
        top_k: int,
        pairs: Sequence[Mapping[str, list[int]]],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, model, exit_layer, top_k, {"digest of the texts": digest(pairs)}, digests)
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

    @torch.inference_mode()
    def _compute(self, indices: Sequence[int]) -> list[tuple[dict[str, Any], CachedText]]:
        prompts = [self._inputs(index) for index in indices]
        cache = self._model.decoder.new_cache(len(prompts), max(map(len, prompts)))
        states, final = self._prefill(prompts, cache)
        texts = []
        for row, (index, prompt) in enumerate(zip(indices, prompts, strict=True)):
            if index not in self._records:
                first, own = self._firsts[index], states[row, : len(prompt)].clone().cpu()
                text = CachedText(own, first, self._top_k(final[row, first : len(prompt)]))
                texts.append(({"text": index}, text))
        return texts


def _first_labelled(pair: Mapping[str, list[int]], index: int) -> int:
    first = next((row for row, label in enumerate(pair["labels"][1:]) if label != IGNORE), None)
    if first is None:
        raise ValueError(f"text {index} has no labelled token")
    return first


class GeneratedTextCache(HiddenStateCache):
    """Cached hidden states and top-k of texts that the model generates greedily after prompts, with all layers.

    It continues the first ``count`` prompts, lists of token ids of which none is empty. Texts that are in the folder
    are used again, also with another ``count``. ``eos_token_id`` ends a text. With ``whole``, the rows of the prompts
    get top-k, too. A `TextCache` of the same texts has the same values up to rounding, and costs a second pass over
    every token.
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
        digests: Mapping[str, str] | None = None,
    ) -> None:
        pairs = [{"input_ids": list(prompt), "labels": []} for prompt in prompts]
        work = {"digest of the prompts": digest(pairs), "new tokens": max_new_tokens, "whole": whole}
        super().__init__(folder, model, exit_layer, top_k, work, digests)
        empty = next((index for index, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise ValueError(f"prompt {empty} has no token")
        self._prompts, self._count, self._whole = prompts, min(count, len(prompts)), whole
        self._max_new_tokens, self._eos = max_new_tokens, eos_token_id

    def __len__(self) -> int:
        return self._count

    def new_tokens(self, index: int) -> list[int]:
        """The tokens after a prompt that is continued."""
        tokens: list[int] = self._records[index]["tokens"]
        return tokens

    def _inputs(self, index: int) -> list[int]:
        return [*self._prompts[index], *self.new_tokens(index)[:-1]]

    def _first(self, index: int) -> int:
        return 0 if self._whole else len(self._prompts[index]) - 1

    def _batches(self) -> Iterator[list[int]]:
        missing = [index for index in range(self._count) if index not in self._records]
        for begin in range(0, len(missing), BATCH * SORTED):
            near = sorted(missing[begin : begin + BATCH * SORTED], key=lambda index: len(self._prompts[index]))
            yield from (near[first : first + BATCH] for first in range(0, len(near), BATCH))

    @torch.inference_mode()
    def _compute(self, indices: Sequence[int]) -> list[tuple[dict[str, Any], CachedText]]:
        """Continue some prompts together, until the last of them ends."""
        device, prompts = self._model.device, [self._prompts[index] for index in indices]
        cache = self._model.decoder.new_cache(len(prompts), max(map(len, prompts)) + self._max_new_tokens)
        prefilled, final = self._prefill(prompts, cache)
        states = [[prefilled[row, : len(prompt)].cpu()] for row, prompt in enumerate(prompts)]
        top_k = [
            [self._top_k(final[row, self._first(index) : len(prompt)])]
            for row, (index, prompt) in enumerate(zip(indices, prompts, strict=True))
        ]
        lens = torch.tensor([len(prompt) for prompt in prompts], device=device)
        token = torch.tensor([int(one.ids[-1, 0]) for (one,) in top_k], device=device)
        new_tokens: list[list[int]] = [[] for _ in indices]
        running = list(range(len(indices)))
        while True:
            for row, one in zip(running, token.tolist(), strict=True):
                new_tokens[row].append(one)
            unfinished = [
                row for row in running
                if new_tokens[row][-1] != self._eos and len(new_tokens[row]) < self._max_new_tokens
            ]  # fmt: skip
            if not unfinished:
                break
            token, running = token[torch.tensor([row in unfinished for row in running])], unfinished
            slots = torch.tensor(running, device=device)
            state, step = self._step(token, cache, lens[slots], slots)
            lens[slots] += 1
            token = step.ids[:, 0].long().to(device)
            for place, row in enumerate(running):
                states[row].append(state[place].cpu())
                top_k[row].append(TopK(*(part[place : place + 1] for part in step)))
        texts = []
        for index, tokens, of_text, tops in zip(indices, new_tokens, states, top_k, strict=True):
            top = TopK(*map(torch.cat, zip(*tops, strict=True)))
            texts.append(({"text": index, "tokens": tokens}, CachedText(torch.cat(of_text), self._first(index), top)))
        return texts

    def _step(self, token: Tensor, cache: SharedKVCache, lens: Tensor, slots: Tensor) -> tuple[Tensor, TopK]:
        """One token of each running text through the model: states [B, 1, D] after layer E, and top-k."""
        decoder = self._model.decoder
        state = decoder.forward(self._model.embed(token[:, None]), cache, 0, self.exit_layer, lens, slots)
        return state, self._top_k(decoder.forward(state, cache, self.exit_layer, None, lens, slots)[:, 0])


class CachedTexts:
    """Some texts of some caches."""

    def __init__(self, places: Sequence[tuple[HiddenStateCache, int]]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> CachedText:
        cache, place = self._places[index]
        return cache[place]

    def rows(self, index: int) -> int:
        """The number of rows of a text with top-k."""
        cache, place = self._places[index]
        return cache.rows(place)
