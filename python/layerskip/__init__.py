"""Early exit and self-speculative decoding for models that people already have (LayerSkip, arXiv 2404.16710)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding import (
        DraftHead,
        GenerationOutput,
        SamplingParams,
        SelfSpeculativeDecoder,
        Session,
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
    from .transformers.custom_generate import generate

_HOMES = {
    "DraftHead": "decoding",
    "EarlyExitHead": "models",
    "GenerationOutput": "decoding",
    "LayerSkipModel": "models",
    "PartialDepthDecoder": "models",
    "SamplingParams": "decoding",
    "SelfSpeculativeDecoder": "decoding",
    "Session": "decoding",
    "SharedKVCache": "models",
    "Stats": "decoding",
    "StopStrings": "decoding",
    "TextStream": "decoding",
    "UnsupportedModelError": "models",
    "Update": "decoding",
    "accelerate": "transformers.acceleration",
    "adapt": "models",
    "generate": "transformers.custom_generate",
    "load": "models",
    "restore": "transformers.acceleration",
    "supported_architectures": "models",
}

__all__ = [
    "DraftHead",
    "EarlyExitHead",
    "GenerationOutput",
    "LayerSkipModel",
    "PartialDepthDecoder",
    "SamplingParams",
    "SelfSpeculativeDecoder",
    "Session",
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
    """Import a name only when it is used: vLLM imports this package in every process, for its plugin alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
