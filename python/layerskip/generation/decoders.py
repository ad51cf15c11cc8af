"""The decoders of the models that ``generate`` was called with."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..decoding import DraftHead, SelfSpeculativeDecoder


class _Entry(NamedTuple):
    weights: tuple[Any, ...]
    draft_head: str | DraftHead
    decoder: SelfSpeculativeDecoder


_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def decoder_of(model: Any, draft_head: str | DraftHead) -> SelfSpeculativeDecoder:
    """The decoder of ``model``; it, its cache and what it learned about speed are kept for as long as the model is.

    Other weights, another device or another draft head make a new one. Weights that change in place are shared, and
    make a new one only where the draft head is a quantised copy of them.
    """
    weights: tuple[Any, ...] = tuple((id(weight), weight.dtype, weight.device) for weight in model.parameters())
    if draft_head != "full":
        weights = (*weights, _version(model.get_output_embeddings().weight))
    entry = _entries.get(model)
    if entry is None or entry.weights != weights or entry.draft_head != draft_head:
        entry = _Entry(weights, draft_head, SelfSpeculativeDecoder(model, "auto", "auto", draft_head=draft_head))
        _entries[model] = entry
    return entry.decoder


def _version(weight: Tensor) -> int:
    """Counts changes in place; inference tensors don't count theirs."""
    return 0 if weight.is_inference() else weight._version
