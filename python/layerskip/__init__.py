"""Early exit and self-speculative decoding for models that people already have (LayerSkip, arXiv 2404.16710)."""

from .decoding import DraftHead, GenerationOutput, SamplingParams, SelfSpeculativeDecoder, Session, Stats, Update
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
    "SamplingParams",
    "SelfSpeculativeDecoder",
    "Session",
    "SharedKVCache",
    "Stats",
    "TextStream",
    "UnsupportedModelError",
    "Update",
    "accelerate",
    "adapt",
    "load",
    "restore",
    "supported_architectures",
]
