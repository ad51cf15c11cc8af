"""Self-speculative decoding: a model's early layers draft, its remaining layers verify."""

from .adaptive import Choice, Controller
from .decoder import SelfSpeculativeDecoder
from .draft_head import DraftHead
from .output import GenerationOutput, Stats, Streamer
from .sampling import SamplingParams
from .session import Session, Update

__all__ = [
    "Choice",
    "Controller",
    "DraftHead",
    "GenerationOutput",
    "SamplingParams",
    "SelfSpeculativeDecoder",
    "Session",
    "Stats",
    "Streamer",
    "Update",
]
