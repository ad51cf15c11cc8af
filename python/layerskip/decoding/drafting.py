"""What a decoder drafts with, and how it comes to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models import BoundExit, Exit, LayerSkipModel
from .draft_head import DraftHead


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
            return model.with_exit(self.exit.of(model, rows))
        if rows in (None, "full"):
            return model
        return model.with_exit(BoundExit(None, model.head.quantize(None if isinstance(rows, str) else rows)))

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
