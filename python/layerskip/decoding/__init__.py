"""Self-speculative decoding: a model's early layers draft, its remaining layers verify."""

from .adaptive import Choice, Controller
from .conversation import Conversation
from .decoder import SelfSpeculativeDecoder
from .detokenizer import StopStrings, TextStream
from .draft_model import DraftHead
from .draft_sources import DraftSource, NgramSource
from .outputs import GenerationOutput, RoundRecord, Stats, Streamer, Update
from .sampling import SamplingParams
from .scheduler import SessionFullError
from .session import Session

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
