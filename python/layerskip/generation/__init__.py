"""Self-speculative decoding inside transformers' own ``generate``."""

from .call import generate

__all__ = ["generate"]
