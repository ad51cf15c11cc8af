"""Self-speculative decoding: a model's early layers draft, its remaining layers verify."""

from .controller import Choice, Controller
from .decoder import SelfSpeculativeDecoder
from .draft_head import DraftHead
from .output import GenerationOutput, Stats, Streamer, Update
from .sampling import SamplingParams
from .session import Session
from .text import StopStrings, TextStream

__all__ = [
    "Choice",
    "Controller",
    "DraftHead",
    "GenerationOutput",
    "SamplingParams",
    "SelfSpeculativeDecoder",
    "Session",
    "Stats",
    "StopStrings",
    "Streamer",
    "TextStream",
    "Update",
]
