"""How texts are held out, the same everywhere."""

from __future__ import annotations

import hashlib


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone: what deterministic splits compare with a share."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
