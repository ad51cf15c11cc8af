"""Adapters that turn Hugging Face models into early-exit models, and loading from disk."""

from .adapters import UnsupportedModelError, adapt, supported_architectures
from .fusion import accelerate, restore
from .loading import ModelFileError, load
from .model import LayerSkipModel

__all__ = [
    "LayerSkipModel",
    "ModelFileError",
    "UnsupportedModelError",
    "accelerate",
    "adapt",
    "load",
    "restore",
    "supported_architectures",
]
