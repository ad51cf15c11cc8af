"""Adapters that turn Hugging Face models into early-exit models, and loading from disk."""

from .adapters import UnsupportedModelError, adapt, supported_architectures
from .loading import ModelFileError, load
from .model import LayerSkipModel

__all__ = ["LayerSkipModel", "ModelFileError", "UnsupportedModelError", "adapt", "load", "supported_architectures"]
