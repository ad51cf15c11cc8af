"""The draft model of a decoder: exit, draft head and KV caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import models, registry
from .._files import write_atomically
from .._imports import need
from ..models import BoundExit, EarlyExitHead, Exit, LayerSkipModel, SharedKVCache
from ..models.hf_checks import ModelWatch
from ..models.weight_arena import gather_exit
from . import cuda_graphs, validation
from .adaptive import Controller, Sizes, default_exits
from .cuda_graphs import Graphs

FILE_NAME = "draft_head.safetensors"


class DraftHead:
    """The tokens worth drafting. Drafts are chosen with their rows of the model's head, in int8.

    Other tokens are never drafted, but verification with the full head still emits them, so the result is the same.
    Only the choice of tokens is kept and saved; the rows are taken from the model that it is used with.

    Parameters
    ----------
    token_ids : Tensor [S] or sequence of int
        In any order, repeated or not.
    vocab_size : int
        V of the model.

    Raises
    ------
    ValueError
        If there is no token, or one is outside the vocabulary.
    """

    def __init__(self, token_ids: Tensor | Sequence[int], vocab_size: int) -> None:
        self.token_ids = torch.as_tensor(token_ids, dtype=torch.int64).unique()  # sorted
        self.vocab_size = vocab_size
        if self.token_ids.numel() == 0:
            raise ValueError("a draft head needs at least one token")
        first, last = int(self.token_ids[0]), int(self.token_ids[-1])
        if first < 0 or last >= vocab_size:
            raise ValueError(f"token id {first if first < 0 else last} is outside the vocabulary of {vocab_size}")

    @classmethod
    def from_tokens(
        cls, texts: Iterable[Sequence[int]], vocab_size: int, eos_token_id: int | Sequence[int], size: int = 8192
    ) -> DraftHead:
        """The ``size`` most frequent tokens of tokenized texts, and always those that end a sequence.

        If the texts have fewer different tokens, the lowest ids are added: byte-pair vocabularies list frequent tokens
        first.

        Raises
        ------
        ValueError
            If ``size`` does not fit the vocabulary, or a token is outside it.
        """
        if not 1 <= size <= vocab_size:
            raise ValueError(f"size must be in 1 … {vocab_size}, the vocabulary, got {size}")
        stops = validation.stop_tokens(eos_token_id, vocab_size)
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for text in texts:
            tokens = torch.as_tensor(text, dtype=torch.int64)
            outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
            if outside.numel():
                raise ValueError(f"token id {int(outside[0])} is outside the vocabulary of {vocab_size}")
            counts += tokens.bincount(minlength=vocab_size)
        counts[sorted(stops)] = torch.iinfo(torch.int64).max
        return cls(counts.sort(descending=True, stable=True).indices[:size], vocab_size)

    def of(self, model: LayerSkipModel) -> EarlyExitHead:
        """The rows of ``model``'s head for these tokens, in int8 with one scale a row."""
        return model.head.quantize(self.rows(model))

    def rows(self, model: LayerSkipModel) -> Tensor:
        """The rows of a model's head that it takes, on the model's device; ValueError for another vocabulary."""
        if model.vocab_size != self.vocab_size:
            raise ValueError(
                f"the draft head is for a vocabulary of {self.vocab_size}, the model has {model.vocab_size}"
            )
        return self.token_ids.to(model.device)

    def save(self, path: str | Path) -> Path:
        """Write a file, or ``draft_head.safetensors`` in a directory; whole or not at all."""
        target = _file(path)
        data = need("safetensors.torch", "saving a draft head").save(
            {"token_ids": self.token_ids.cpu()}, metadata={"vocab_size": str(self.vocab_size)}
        )
        write_atomically(target, data)
        return target

    @classmethod
    def load(cls, source: str | Path) -> DraftHead:
        """Read what `save` wrote, from a file or a directory, or what a model that a package provides comes with.

        Parameters
        ----------
        source : str or Path
            A path, or the model's name (`layerskip.registry`).

        Raises
        ------
        FileNotFoundError, ModuleNotFoundError, ValueError
            If there is none, or it is not a draft head.
        """
        safetensors = need("safetensors", "reading a draft head")
        named = isinstance(source, str) and "/" not in source
        path = registry.draft_head(str(source)) if named else None
        path = path or _file(source)
        if not path.exists():
            hint = f"; {registry.hint(registry.MODELS, str(source))}" if named else ""
            raise FileNotFoundError(f"no draft head at {path}{hint}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                vocab_size = (file.metadata() or {})["vocab_size"]
                return cls(file.get_tensor("token_ids"), int(vocab_size))
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a draft head: {error}") from error


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


CACHE_GRANULARITY = 256


class LentCache(NamedTuple):
    """A cache, and the rounds that were recorded over it, if the model is on a card."""

    cache: SharedKVCache
    graphs: Graphs | None


class CachePool:
    """Keeps the caches that no call uses; as many as have ever been used at once.

    Parameters
    ----------
    model : LayerSkipModel

    Attributes
    ----------
    model : LayerSkipModel
    idle : list of LentCache
        The last of them goes to the next call, and comes back as the last.
    """

    def __init__(self, model: LayerSkipModel) -> None:
        self.model = model
        self._lock = Lock()
        self.idle: list[LentCache] = []

    @contextmanager
    def borrow(self, batch: int, length: int) -> Iterator[LentCache]:
        """A cache with room for so many sequences and positions, for one call.

        Its content lies beyond the lengths of the new sequences, so nobody reads it.
        """
        with self._lock:
            lent = self.idle.pop() if self.idle else None
        lent = self._with_room(lent, batch, length)
        try:
            yield lent
        finally:
            with self._lock:
                self.idle.append(lent)

    @torch.inference_mode(False)
    def _with_room(self, lent: LentCache | None, batch: int, length: int) -> LentCache:
        """The given cache if it is big enough and of the model's dtype and device, else a new one in its place."""
        graphs, serves = (
            cuda_graphs.for_device(self.model.device),
            lent is not None and self._serves(lent.cache, batch, length),
        )
        if lent is not None and serves and (graphs is None) == (lent.graphs is None):
            return lent
        if lent is not None and lent.graphs is not None:
            lent.graphs.finish()  # the last round may still be writing to the cache
        if lent is not None and serves:
            return LentCache(lent.cache, graphs)
        capacity = -(-length // CACHE_GRANULARITY) * CACHE_GRANULARITY
        return LentCache(self.model.decoder.new_cache(batch, capacity), graphs)

    def _serves(self, cache: SharedKVCache, batch: int, length: int) -> bool:
        like = (self.model.dtype, self.model.device)
        return cache.batch_size >= batch and cache.capacity >= length and (cache.k.dtype, cache.k.device) == like


@dataclass(frozen=True)
class Drafting:
    """An exit, or the model's own layers and norm; and the rows of the head that choose among tokens.

    Parameters
    ----------
    exit : Exit, str, Path or None
        A name or a path is read.
    draft_head : {"full", "int8"}, DraftHead or None
        None: the exit's own, or all rows.
    """

    exit: Exit | None
    draft_head: str | DraftHead | None

    @classmethod
    def of(cls, exit: Exit | str | Path | None, draft_head: str | DraftHead | None) -> Drafting:
        """What a user gives: an exit by name or path is read."""
        if not (draft_head in (None, "full", "int8") or isinstance(draft_head, DraftHead)):
            raise ValueError(f"draft_head must be 'full', 'int8' or a DraftHead, got {draft_head!r}")
        return cls(exit if exit is None or isinstance(exit, Exit) else Exit.load(exit), draft_head)

    def on(self, model: LayerSkipModel) -> LayerSkipModel:
        """The model that drafts so, on the same storage.

        Raises
        ------
        ValueError
            If the exit or the draft head is for another model.
        """
        rows = self._rows(model)
        if self.exit is not None:
            bound = self.exit.of(model, rows)
        elif rows in (None, "full"):
            return model
        else:
            bound = BoundExit(None, model.head.quantize(None if isinstance(rows, str) else rows))
        return model.with_exit(gather_exit(bound))

    def _rows(self, model: LayerSkipModel) -> str | Tensor | None:
        return self.draft_head.rows(model) if isinstance(self.draft_head, DraftHead) else self.draft_head

    def state(self, model: LayerSkipModel) -> tuple[Any, ...]:
        """What `on` depends on: it changes with dtype, device and, where the head is a copy, its weights."""
        weight = model.head.head_weight
        kind = (weight.dtype, weight.device)
        if not self._copies:
            return kind
        version = 0 if weight.is_inference() else weight._version  # inference tensors do not count it
        return (*kind, weight.data_ptr(), version)

    @property
    def _copies(self) -> bool:
        if self.exit is not None and self.exit.head_down is not None:
            return True
        reduced = self.exit is not None and self.exit.token_ids is not None
        return reduced if self.draft_head is None else self.draft_head != "full"


class DraftingModel:
    """A model with what drafts for it, which follows what becomes of the model that it was made from.

    Parameters
    ----------
    model : transformers.PreTrainedModel or LayerSkipModel
    drafting : Drafting
    exit_layer : int or "auto"
    exit_choices : sequence of int, optional
        What "auto" picks from, where ``drafting`` has no exit.

    Attributes
    ----------
    model : LayerSkipModel
    controller : Controller
    caches : CachePool
        Of ``model``.

    Raises
    ------
    ValueError
        If the exit, or a layer, is not one of the model's.
    """

    def __init__(
        self, model: Any, drafting: Drafting, exit_layer: int | str, exit_choices: Sequence[int] | None
    ) -> None:
        self._watch = None if isinstance(model, LayerSkipModel) else ModelWatch(model)
        self._drafting, self._exit_layer, self._exit_choices = drafting, exit_layer, exit_choices
        self._following = Lock()
        self._adopt(models.adapt(model) if self._watch else model)

    def _adopt(self, model: LayerSkipModel) -> None:
        """Decode with this model from now on; what was kept for another one is dropped."""
        validation.exit_layer_or_auto(self._exit_layer, model.num_layers)
        exits = self._exits(model)
        self._bind(model)
        self.controller = Controller(Sizes.of(self.model), exits)

    def _exits(self, model: LayerSkipModel) -> Sequence[int]:
        """The layers that the controller picks from."""
        own, choices = self._drafting.exit, self._exit_choices
        if own is not None and choices is not None:
            raise ValueError(
                f"exit_choices is {choices!r}, but the exit that is given is after {own.exit_layer} layers"
            )
        if own is not None:
            return (own.exit_layer,)
        if choices is None:
            return default_exits(model.num_layers)
        if not choices:
            raise ValueError(f"exit_choices must hold at least one layer, got {choices!r}")
        return [validation.exit_layer(choice, model.num_layers) for choice in choices]

    def _bind(self, model: LayerSkipModel) -> None:
        """Let this model draft as it was asked for."""
        self.model = self._drafting.on(model)
        self._without_exit, self._bound = model, self._drafting.state(model)
        self.caches = CachePool(self.model)

    def follow(self) -> CachePool:
        """Adapt the model anew if it has changed since, and what drafts if the weights that it copies have.

        Returns
        -------
        CachePool
            The caches of the model as it is now, and this model.

        Raises
        ------
        UnsupportedModelError
            If it has become a model that cannot be adapted, or has hooks, which would not be called.
        """
        with self._following:
            changed = None if self._watch is None else self._watch.changed()
            if changed is not None:
                self._adopt(models.adapt(changed))
                self._watch = ModelWatch(changed)
            elif self._drafting.state(self._without_exit) != self._bound:
                self._bind(self._without_exit)
            return self.caches
