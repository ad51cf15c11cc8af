"""Early-exit models: their parts, how they are made of Hugging Face models, and loading from disk."""

from .adaptation import adapt
from .architectures import supported_architectures
from .exit import Exit
from .files import ModelFileError
from .head import EarlyExitHead, ExitWeights
from .hf_checks import UnsupportedModelError
from .kv_cache import SharedKVCache
from .layers import PartialDepthDecoder
from .loading import load, save
from .model import LayerSkipModel
from .weight_arena import gather_weights, scatter_weights

__all__ = [
    "EarlyExitHead",
    "Exit",
    "ExitWeights",
    "LayerSkipModel",
    "ModelFileError",
    "PartialDepthDecoder",
    "SharedKVCache",
    "UnsupportedModelError",
    "adapt",
    "gather_weights",
    "load",
    "save",
    "scatter_weights",
    "supported_architectures",
]
