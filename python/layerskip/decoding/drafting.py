"""What a decoder drafts with, and how it comes to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from .. import models
from ..models import BoundExit, Exit, LayerSkipModel
from ..models.arena import gather_exit
from ..models.watch import ModelWatch
from . import validation
from .cache_pool import CachePool
from .controller import Controller, default_exits
from .costs import Sizes
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
