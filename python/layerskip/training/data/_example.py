"""The record that all tasks yield."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One training pair: the model reads ``prompt`` and is to write ``completion``, then the end-of-text token.

    ``group`` names what the pair was cut from (a template, a file, a paper).
    """

    prompt: str
    completion: str
    group: str
