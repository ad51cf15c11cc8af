"""Early exit and self-speculative decoding for models that people already have (LayerSkip, arXiv 2404.16710)."""

from .decoding import DraftHead, GenerationOutput, SelfSpeculativeDecoder, Stats
from .decoding.streaming import TextStream
from .models import (
    LayerSkipModel,
    UnsupportedModelError,
    accelerate,
    adapt,
    load,
    restore,
    supported_architectures,
)
from .modules import EarlyExitHead, PartialDepthDecoder, SharedKVCache

__all__ = [
    "DraftHead",
    "EarlyExitHead",
    "GenerationOutput",
    "LayerSkipModel",
    "PartialDepthDecoder",
    "SelfSpeculativeDecoder",
    "SharedKVCache",
    "Stats",
    "TextStream",
    "UnsupportedModelError",
    "accelerate",
    "adapt",
    "load",
    "restore",
    "supported_architectures",
]
