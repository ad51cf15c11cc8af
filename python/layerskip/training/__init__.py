"""The LayerSkip training recipe (arXiv 2404.16710) as parts, and a Trainer that puts them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._extras import need
from .convert import Conversion, convert, revert
from .dataset import Collator, LengthBuckets, encode, read_pairs
from .dropout import LayerDropout, apply_to_rows, dropout_scale, layer_dropout_rates
from .exits import (
    AllExits,
    Curriculum,
    GradualCurriculum,
    RandomExits,
    RotationalCurriculum,
    ShallowSteps,
    early_exit_weights,
)
from .survey import ExitSurvey, survey_exits

if TYPE_CHECKING:
    from .trainer import Batching, LayerSkipTrainer, Plan

__all__ = [
    "AllExits",
    "Batching",
    "Collator",
    "Conversion",
    "Curriculum",
    "ExitSurvey",
    "GradualCurriculum",
    "LayerDropout",
    "LayerSkipTrainer",
    "LengthBuckets",
    "Plan",
    "RandomExits",
    "RotationalCurriculum",
    "ShallowSteps",
    "apply_to_rows",
    "convert",
    "dropout_scale",
    "early_exit_weights",
    "encode",
    "layer_dropout_rates",
    "read_pairs",
    "revert",
    "survey_exits",
]


def __getattr__(name: str) -> Any:
    """The Trainer on demand: it imports accelerate and much of transformers, which the parts do without."""
    if name in ("Batching", "LayerSkipTrainer", "Plan"):
        need("transformers", "training", "train")
        need("accelerate", "training", "train")
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
