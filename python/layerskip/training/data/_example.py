"""The record that all tasks yield."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One training pair: the model reads ``prompt`` and is to write ``completion``, then the end-of-text token.

    ``group`` names what the pair was cut from (a template, a file, a paper).
    """

    prompt: str
    completion: str
    group: str


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone: what deterministic splits compare with a share."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
