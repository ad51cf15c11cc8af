"""Random draws as functions of what they are for, so that a resumed run repeats them without any saved state."""

from __future__ import annotations

import hashlib

import torch


def generator(*purpose: object) -> torch.Generator:
    """A CPU generator seeded by the words of ``purpose``, for example ("layer dropout", seed, step)."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
