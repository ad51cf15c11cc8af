"""The decoders that ``generate`` keeps for each model that it was called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..decoding import DraftHead, SelfSpeculativeDecoder


class _Pool(NamedTuple):
    weights: tuple[Any, ...]
    draft_head: str | DraftHead
    idle: list[SelfSpeculativeDecoder]


_pools: WeakKeyDictionary[nn.Module, _Pool] = WeakKeyDictionary()


@contextmanager
def borrow_decoder(model: Any, draft_head: str | DraftHead) -> Iterator[SelfSpeculativeDecoder]:
    """A decoder of ``model`` that no other call uses in the meantime.

    The decoder, its cache and what it learned about speed are kept for the next call, as long as the model lives. A new
    decoder is made for other weights, another device or another draft head. Changes of the weights in place are shared;
    they make a new decoder only where the draft head is a quantised copy of the weights.
    """
    pool = _pool(model, draft_head)
    decoder = pool.idle.pop() if pool.idle else SelfSpeculativeDecoder(model, "auto", "auto", draft_head=draft_head)
    try:
        yield decoder
    finally:
        pool.idle.append(decoder)


def _pool(model: Any, draft_head: str | DraftHead) -> _Pool:
    weights: tuple[Any, ...] = tuple((id(weight), weight.dtype, weight.device) for weight in model.parameters())
    if draft_head != "full":
        weights = (*weights, _version(model.get_output_embeddings().weight))
    pool = _pools.get(model)
    if pool is None or pool.weights != weights or pool.draft_head != draft_head:
        pool = _pools[model] = _Pool(weights, draft_head, [])
    return pool


def _version(weight: Tensor) -> int:
    """How often ``weight`` was changed in place; inference tensors do not count that."""
    return 0 if weight.is_inference() else weight._version
