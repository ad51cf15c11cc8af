"""Draft model of a decoder: exit, draft head and KV caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .. import models, registry
from .._autograd_modes import InferenceMode
from ..models import Exit, ExitWeights, LayerSkipModel, SharedKVCache
from ..models.files import load_tensors, metadata_integer, save_tensors
from ..models.hf_checks import ModelSnapshot
from ..models.weight_arena import gather_exit
from . import cuda_graphs, validation
from .adaptive import Controller, Sizes, default_exits
from .cuda_graphs import Graphs

FILE_NAME = "draft_head.safetensors"


class DraftHead:
    """Token ids worth drafting: drafts are chosen with their rows of the model's head, in int8.

    Other tokens are never drafted, but verification still emits them, so the result is the same. Only the token ids are
    saved; the rows come from the model.

    Parameters
    ----------
    token_ids : Tensor [S] or sequence of int
        In any order, duplicates allowed.
    vocab_size : int

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
        """Choose the ``size`` most frequent tokens of tokenized texts, with all EOS tokens.

        If the texts have fewer different tokens, the lowest ids are added: byte-pair vocabularies start with frequent
        tokens.

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

    def rows(self, model: LayerSkipModel) -> Tensor:
        """Return the rows of the model's head on its device; ValueError for another vocabulary."""
        if model.vocab_size != self.vocab_size:
            raise ValueError(
                f"the draft head is for a vocabulary of {self.vocab_size}, the model has {model.vocab_size}"
            )
        return self.token_ids.to(model.device)

    def save(self, path: str | Path) -> Path:
        """Write a file, or ``draft_head.safetensors`` in a directory, atomically."""
        metadata = {"vocab_size": self.vocab_size}
        return save_tensors(_file(path), "a draft head", {"token_ids": self.token_ids}, metadata)

    @classmethod
    def load(cls, source: str | Path) -> DraftHead:
        """Read a file of `save`, or the draft head of a registered model.

        Parameters
        ----------
        source : str or Path
            File, directory, or name of a model in `layerskip.registry`.

        Raises
        ------
        FileNotFoundError, ModuleNotFoundError, ValueError
            If it does not exist, or is not a draft head.
        """

        def make(metadata: dict[str, str], tensors: dict[str, Tensor]) -> DraftHead:
            return cls(tensors["token_ids"], metadata_integer(metadata, "vocab_size"))

        return load_tensors(source, _file(source), "a draft head", registry.draft_head, make)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


CACHE_GRANULARITY = 256

Lent = tuple[SharedKVCache, Graphs | None]  # a cache and, on a GPU, the rounds that were recorded over it


class CachePool:
    """Idle KV caches of a decoder, at most as many as were ever in use at once; the last one serves the next call."""

    def __init__(self, model: LayerSkipModel) -> None:
        self.model = model
        self._lock = Lock()
        self.idle: list[Lent] = []

    @contextmanager
    def borrow(self, batch: int, length: int) -> Iterator[Lent]:
        """Lend a cache with room for ``batch`` sequences of ``length`` positions.

        Its old content lies beyond the lengths of the new sequences, so it is never read.
        """
        with self._lock:
            lent = self.idle.pop() if self.idle else None
        lent = self._with_room(lent, batch, length)
        try:
            yield lent
        finally:
            with self._lock:
                self.idle.append(lent)

    def _with_room(self, lent: Lent | None, batch: int, length: int) -> Lent:
        """Return the given cache if it is large enough and of the model's dtype and device, else a new one."""
        model, graphs = self.model, cuda_graphs.for_device(self.model.device)
        if lent is not None:
            cache, recorded = lent
            fits = cache.batch_size >= batch and cache.capacity >= length
            fits = fits and (cache.k.dtype, cache.k.device) == (model.dtype, model.device)
            if fits and (graphs is None) == (recorded is None):
                return lent
            if recorded is not None:
                recorded.finish()  # the last round may still be writing to the cache
            if fits:
                return cache, graphs
        capacity = -(-length // CACHE_GRANULARITY) * CACHE_GRANULARITY
        with InferenceMode(False):
            return model.decoder.new_cache(batch, capacity), graphs


class DraftModel:
    """A model and its exit, kept up to date with the model that it was made from.

    The parameters are those of `SelfSpeculativeDecoder`. ``model``, ``controller`` and ``caches`` change together when
    the model has changed.
    """

    def __init__(
        self,
        model: Any,
        exit_layer: int | str | None,
        exit_choices: Sequence[int] | None,
        exit: Exit | str | Path | None,
        draft_head: str | DraftHead | None,
    ) -> None:
        if not (draft_head in (None, "full", "int8") or isinstance(draft_head, DraftHead)):
            raise ValueError(f"draft_head must be 'full', 'int8' or a DraftHead, got {draft_head!r}")
        if exit == "auto" and (exit_layer not in (None, "auto") or exit_choices is not None):
            exit = None
        self._ships_exit = exit == "auto"  # if a package does
        self._exit: Exit | None = None
        if not self._ships_exit:
            self._exit = exit if exit is None or isinstance(exit, Exit) else Exit.load(exit)
        self._draft_head, self._exit_choices = draft_head, exit_choices
        self._exit_layer: int | str = "auto" if exit_layer is None else exit_layer
        self._watch = None if isinstance(model, LayerSkipModel) else ModelSnapshot(model)
        self._following = Lock()
        self._adopt(models.adapt(model) if self._watch else model)

    def follow(self) -> CachePool:
        """Adapt the model anew if it has changed, copy its head anew if the weights have; return its caches.

        Raises
        ------
        UnsupportedModelError
            If the model can no longer be adapted, or has hooks, which would not be called.
        """
        with self._following:
            changed = None if self._watch is None else self._watch.changed()
            if changed is not None:
                self._adopt(models.adapt(changed))
                self._watch = ModelSnapshot(changed)
            elif self._state(self._without_exit) != self._bound:
                self._bind(self._without_exit)
            return self.caches

    def _adopt(self, model: LayerSkipModel) -> None:
        """Decode with this model from now on; drop the caches and statistics of the last one."""
        if self._ships_exit:
            self._exit = Exit.shipped_for(model)
        self.exit_layer = self._exit_layer
        if self._exit is not None:
            self.exit_layer = validation.exit_layer_of_exit(self._exit_layer, self._exit.exit_layer)
        validation.exit_layer_or_auto(self.exit_layer, model.num_layers)
        exits = self._exits(model)
        self._bind(model)
        self.controller = Controller(Sizes.of(self.model), exits)

    def _exits(self, model: LayerSkipModel) -> Sequence[int]:
        choices = self._exit_choices
        if self._exit is not None:
            if choices is not None:
                raise ValueError(
                    f"exit_choices is {choices!r}, but the exit that is given is after {self._exit.exit_layer} layers"
                )
            return (self._exit.exit_layer,)
        if choices is None:
            return default_exits(model.num_layers)
        if not choices:
            raise ValueError(f"exit_choices must hold at least one layer, got {choices!r}")
        return [validation.exit_layer(choice, model.num_layers) for choice in choices]

    def _bind(self, model: LayerSkipModel) -> None:
        """Attach exit and draft head to the model; they share its storage."""
        head = self._draft_head.rows(model) if isinstance(self._draft_head, DraftHead) else self._draft_head
        bound = None
        if self._exit is not None:
            bound = self._exit.of(model, head)
        elif self._copies_head:
            bound = ExitWeights(None, model.head.quantize(None if isinstance(head, str) else head))
        self.model = model if bound is None else model.with_exit(gather_exit(bound))
        self._without_exit, self._bound = model, self._state(model)
        self.caches = CachePool(self.model)

    def _state(self, model: LayerSkipModel) -> tuple[Any, ...]:
        """Return what `_bind` depends on: dtype, device and, if the draft head is a copy, the weights of the head."""
        weight = model.head.head_weight
        kind = (weight.dtype, weight.device)
        if not self._copies_head:
            return kind
        version = 0 if weight.is_inference() else weight._version  # inference tensors have no version
        return (*kind, weight.data_ptr(), version)

    @property
    def _copies_head(self) -> bool:
        exit_, head = self._exit, self._draft_head
        if exit_ is not None and (exit_.head_down is not None or (head is None and exit_.token_ids is not None)):
            return True
        return head not in (None, "full")
