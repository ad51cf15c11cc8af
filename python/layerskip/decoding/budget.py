"""How much of waiting prompts a step may read while other requests run."""

from __future__ import annotations

import sys

from . import validation

READING_SHARE = 1.0
"""A step with prompts to read takes as long as its rounds, and about so many times that for reading."""
_FIRST = 8  # tokens, before it is known how long one takes
_WEIGHT = 0.25  # of a new measure of that


class PromptBudget:
    """The tokens of prompts that a step may still read.

    Parameters
    ----------
    tokens_per_step : int, "auto" or None
        "auto": as many as can be read in `READING_SHARE` times the time that the step's rounds took, so that streams
        slow down evenly, be their rounds short or long. None: no bound.

    Attributes
    ----------
    left : int
    """

    def __init__(self, tokens_per_step: int | str | None) -> None:
        self._automatic = tokens_per_step == "auto"
        most = sys.maxsize if tokens_per_step in (None, "auto") else tokens_per_step
        self._most = validation.at_least_one("prompt_tokens_per_step", most)
        self._seconds_per_token: float | None = None
        self.left = 0

    def begin_step(self, round_seconds: float) -> None:
        """Set what is left, after the step's rounds, which took so long."""
        self.left = self._most
        if self._automatic:
            known = self._seconds_per_token
            self.left = _FIRST if not known else max(1, int(READING_SHARE * round_seconds / known))

    def spend(self, tokens: int, seconds: float, bounded: bool = True) -> None:
        """Note how long tokens took to read, and take them off where reading is ``bounded``."""
        self.left -= tokens if bounded else 0
        if tokens:
            new, old = seconds / tokens, self._seconds_per_token
            self._seconds_per_token = new if old is None else old + _WEIGHT * (new - old)
