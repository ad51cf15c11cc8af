"""The LayerSkip training recipe (arXiv 2404.16710) as parts, and a Trainer that puts them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import exports

if TYPE_CHECKING:
    from .conversion import Conversion, convert, revert
    from .dataset import Collator, LengthBuckets, encode, read_pairs
    from .dropout import LayerDropout, apply_to_samples, dropout_scale, layer_dropout_rates
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
    "apply_to_samples",
    "convert",
    "dropout_scale",
    "early_exit_weights",
    "encode",
    "layer_dropout_rates",
    "read_pairs",
    "revert",
    "survey_exits",
]

__getattr__ = exports(
    __name__,
    {
        ".conversion": ("Conversion", "convert", "revert"),
        ".dataset": ("Collator", "LengthBuckets", "encode", "read_pairs"),
        ".dropout": ("LayerDropout", "apply_to_samples", "dropout_scale", "layer_dropout_rates"),
        ".exits": (
            "AllExits", "Curriculum", "GradualCurriculum", "RandomExits", "RotationalCurriculum", "ShallowSteps",
            "early_exit_weights",
        ),
        ".survey": ("ExitSurvey", "survey_exits"),
        ".trainer": ("Batching", "LayerSkipTrainer", "Plan"),
    },
    needs={".trainer": [("transformers", "training", "train"), ("accelerate", "training", "train")]},
)  # fmt: skip


def __dir__() -> list[str]:
    """What is exported, imported or not."""
    return __all__
