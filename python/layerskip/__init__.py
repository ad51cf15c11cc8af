"""Early exit and self-speculative decoding for models that people already have (LayerSkip, arXiv 2404.16710)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._imports import exports
from ._registration import register_with_transformers

if TYPE_CHECKING:
    from layerskip_kernels import __version__

    from .decoding import (
        Conversation,
        DraftHead,
        DraftSource,
        GenerationOutput,
        NgramSource,
        SamplingParams,
        SelfSpeculativeDecoder,
        Session,
        SessionFullError,
        Stats,
        StopStrings,
        TextStream,
        Update,
    )
    from .models import (
        EarlyExitHead,
        Exit,
        LayerSkipModel,
        PartialDepthDecoder,
        SharedKVCache,
        UnsupportedModelError,
        adapt,
        gather_weights,
        load,
        scatter_weights,
        supported_architectures,
    )
    from .transformers.acceleration import accelerate, restore
    from .transformers.custom_generate import generate

__all__ = [
    "Conversation",
    "DraftHead",
    "DraftSource",
    "EarlyExitHead",
    "Exit",
    "GenerationOutput",
    "LayerSkipModel",
    "NgramSource",
    "PartialDepthDecoder",
    "SamplingParams",
    "SelfSpeculativeDecoder",
    "Session",
    "SessionFullError",
    "SharedKVCache",
    "Stats",
    "StopStrings",
    "TextStream",
    "UnsupportedModelError",
    "Update",
    "__version__",
    "accelerate",
    "adapt",
    "gather_weights",
    "generate",
    "load",
    "restore",
    "scatter_weights",
    "supported_architectures",
]

__getattr__ = exports(
    __name__,
    {
        ".decoding": (
            "Conversation", "DraftHead", "DraftSource", "GenerationOutput", "NgramSource", "SamplingParams",
            "SelfSpeculativeDecoder", "Session", "SessionFullError", "Stats", "StopStrings", "TextStream", "Update",
        ),
        ".models": (
            "EarlyExitHead", "Exit", "LayerSkipModel", "PartialDepthDecoder", "SharedKVCache",
            "UnsupportedModelError", "adapt", "gather_weights", "load", "scatter_weights", "supported_architectures",
        ),
        ".transformers.acceleration": ("accelerate", "restore"),
        ".transformers.custom_generate": ("generate",),
        "layerskip_kernels": ("__version__",),
    },
    needs={".transformers.custom_generate": [("transformers", "layerskip.generate")]},
)  # fmt: skip

register_with_transformers()


def __dir__() -> list[str]:
    return __all__
