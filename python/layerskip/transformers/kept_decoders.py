"""The decoder that ``generate`` keeps for each model that it was called with."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from ..decoding import DraftHead, SelfSpeculativeDecoder
from ..models import Exit


class _Kept(NamedTuple):
    drafting: tuple[str | DraftHead | None, Exit | str | Path | None]
    decoder: SelfSpeculativeDecoder


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
_lock = Lock()


def decoder_of(
    model: Any, draft_head: str | DraftHead | None, exit: Exit | str | Path | None = None
) -> SelfSpeculativeDecoder:
    """The decoder of ``model``, with its caches and what it learned about speed; a new one for another head or exit.

    It is kept as long as the model lives, and follows what becomes of it. Several calls may use it at the same time.
    """
    with _lock:
        kept = _kept.get(model)
        if kept is None or kept.drafting != (draft_head, exit):
            decoder = SelfSpeculativeDecoder(model, "auto", "auto", draft_head=draft_head, exit=exit)
            kept = _kept[model] = _Kept((draft_head, exit), decoder)
        return kept.decoder
