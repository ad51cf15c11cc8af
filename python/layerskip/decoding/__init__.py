"""Greedy self-speculative decoding: a model's early layers draft, its remaining layers verify."""

from .decoder import SelfSpeculativeDecoder
from .draft_head import DraftHead
from .output import GenerationOutput, Stats
from .transcript import Streamer

__all__ = ["DraftHead", "GenerationOutput", "SelfSpeculativeDecoder", "Stats", "Streamer"]
