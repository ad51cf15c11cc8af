"""Early exit and self-speculative decoding for models that people already have (LayerSkip, arXiv 2404.16710)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .decoding import (
    Conversation,
    DraftHead,
    GenerationOutput,
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
    LayerSkipModel,
    PartialDepthDecoder,
    SharedKVCache,
    UnsupportedModelError,
    adapt,
    load,
    supported_architectures,
)
from .transformers.acceleration import accelerate, restore

if TYPE_CHECKING:
    from .transformers.custom_generate import generate

__all__ = [
    "Conversation",
    "DraftHead",
    "EarlyExitHead",
    "GenerationOutput",
    "LayerSkipModel",
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
    "accelerate",
    "adapt",
    "generate",
    "load",
    "restore",
    "supported_architectures",
]


def __getattr__(name: str) -> Any:
    """Import ``generate`` only when it is used: it needs transformers."""
    if name == "generate":
        from .transformers.custom_generate import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
