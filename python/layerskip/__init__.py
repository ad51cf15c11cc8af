"""Early exit and self-speculative decoding for models that people already have (LayerSkip, arXiv 2404.16710)."""

from .decoding import DraftHead, GenerationOutput, SelfSpeculativeDecoder, Stats

__all__ = ["DraftHead", "GenerationOutput", "SelfSpeculativeDecoder", "Stats"]
