"""Early-exit models: their parts, how they are made of Hugging Face models, and loading from disk."""

from .adaptation import adapt
from .arena import gather_weights, scatter_weights
from .cache import SharedKVCache
from .exit import BoundExit, Exit
from .families import supported_architectures
from .files import ModelFileError
from .head import EarlyExitHead
from .layers import PartialDepthDecoder
from .loading import load
from .model import LayerSkipModel
from .saving import save
from .unsupported import UnsupportedModelError

__all__ = [
    "BoundExit",
    "EarlyExitHead",
    "Exit",
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
