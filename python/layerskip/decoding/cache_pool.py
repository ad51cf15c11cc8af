"""The caches that the calls of a decoder borrow, so that calls in several threads have one each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import torch

from ..models import LayerSkipModel, SharedKVCache
from . import graph
from .graph import Graphs

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
            graph.for_device(self.model.device),
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
