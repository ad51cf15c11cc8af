"""Self-speculative decoding: a model's early layers draft, its remaining layers verify."""

from .controller import Choice, Controller
from .conversation import Conversation
from .decoder import SelfSpeculativeDecoder
from .draft_head import DraftHead
from .line import SessionFullError
from .output import GenerationOutput, RoundRecord, Stats, Streamer, Update
from .sampling import SamplingParams
from .session import Session
from .source import DraftSource, NgramSource
from .text import StopStrings, TextStream

__all__ = [
    "Choice",
    "Controller",
    "Conversation",
    "DraftHead",
    "DraftSource",
    "GenerationOutput",
    "NgramSource",
    "RoundRecord",
    "SamplingParams",
    "SelfSpeculativeDecoder",
    "Session",
    "SessionFullError",
    "Stats",
    "StopStrings",
    "Streamer",
    "TextStream",
    "Update",
]
