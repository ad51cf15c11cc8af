"""The LayerSkip training recipe (arXiv 2404.16710) as parts, and a Trainer that puts them together."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from .._imports import exports

if TYPE_CHECKING:
    from .batching import Collator, LengthBuckets, encode, read_pairs
    from .curriculum import (
        AllExits,
        Curriculum,
        GradualCurriculum,
        LayerDropout,
        RandomExits,
        RotationalCurriculum,
        ShallowSteps,
        apply_to_samples,
        dropout_scale,
        early_exit_weights,
        layer_dropout_rates,
    )
    from .exit_analysis import ExitAnalysis, analyze_exits
    from .hf_conversion import Conversion, convert, revert
    from .trainer import Batching, LayerSkipTrainer, Plan

__all__ = [
    "AllExits",
    "Batching",
    "Collator",
    "Conversion",
    "Curriculum",
    "ExitAnalysis",
    "GradualCurriculum",
    "LayerDropout",
    "LayerSkipTrainer",
    "LengthBuckets",
    "Plan",
    "RandomExits",
    "RotationalCurriculum",
    "ShallowSteps",
    "analyze_exits",
    "apply_to_samples",
    "convert",
    "dropout_scale",
    "early_exit_weights",
    "encode",
    "layer_dropout_rates",
    "read_pairs",
    "revert",
]

_RENAMED = {"ExitSurvey": "ExitAnalysis", "survey_exits": "analyze_exits"}

_export = exports(
    __name__,
    {
        ".batching": ("Collator", "LengthBuckets", "encode", "read_pairs"),
        ".curriculum": (
            "AllExits", "Curriculum", "GradualCurriculum", "LayerDropout", "RandomExits", "RotationalCurriculum",
            "ShallowSteps", "apply_to_samples", "dropout_scale", "early_exit_weights", "layer_dropout_rates",
        ),
        ".exit_analysis": ("ExitAnalysis", "analyze_exits"),
        ".hf_conversion": ("Conversion", "convert", "revert"),
        ".trainer": ("Batching", "LayerSkipTrainer", "Plan"),
    },
    needs={".trainer": [("transformers", "training", "train"), ("accelerate", "training", "train")]},
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"layerskip.training.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return _export(_RENAMED.get(name, name))


def __dir__() -> list[str]:
    return __all__
