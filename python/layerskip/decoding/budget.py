"""How much of waiting prompts a step may read while other requests run."""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import Protocol

from . import validation

LONGEST_STEP = 2.25
"""A step that reads prompts is to take so many times as long as a step without: `_GOAL` at most, and times vary."""
_GOAL = 3.0  # times
_TOO_LONG = 2.4  # times: a size that is known to make a step as long is not tried again
_RECENT = 8  # steps; the shortest of their rounds is the step without, because one round may be disturbed
_WEIGHT = 0.5  # of a new pass in the size and the time of the usual one
_TRIALS = 2  # of a size; the shorter counts, because one may be disturbed
_REMEMBERED = 256  # passes, after which a size that took too long is tried once more


class PromptBudget(Protocol):
    """How many tokens of prompts a step may still read."""

    def begin_step(self, round_seconds: float | None) -> None:
        """Set what is left after the step's rounds, which took so long; None: nothing ran."""

    def next_pass(self, depth: int) -> int:
        """The most tokens of the next pass, which is through so many layers; 0 ends the step."""

    def spend(self, tokens: int, depth: int, seconds: float) -> None:
        """Note a pass, also one that was read while nothing ran and had no bound."""


def prompt_budget(tokens_per_step: int | str | None) -> PromptBudget:
    """`TimeBudget` for "auto", `TokenBudget` for a number, or for None, which is no bound."""
    if tokens_per_step == "auto":
        return TimeBudget()
    most = sys.maxsize if tokens_per_step is None else tokens_per_step
    return TokenBudget(validation.at_least_one("prompt_tokens_per_step", most))


class TokenBudget:
    """So many tokens a step, however long they take."""

    def __init__(self, tokens_per_step: int) -> None:
        self._most = self._left = tokens_per_step

    def begin_step(self, round_seconds: float | None) -> None:  # noqa: D102
        self._left = self._most

    def next_pass(self, depth: int) -> int:  # noqa: D102
        return max(0, self._left)

    def spend(self, tokens: int, depth: int, seconds: float) -> None:  # noqa: D102
        self._left -= tokens


class TimeBudget:
    """As many tokens as keep a step within `LONGEST_STEP`, or one more, so that the size finds its way up from one.

    One token always fits after the shortest of the recent rounds, so reading goes on. After a round that was disturbed,
    or is that of many more requests, even one may take a step beyond `_GOAL`: a pass of one may be as long as a round.
    Such a step reads nothing.

    A pass of n tokens takes a + b n seconds: it streams the weights once, then computes. Which of the two is more
    depends on the machine, so both are bounded instead of fitted. From the usual pass, a larger one is foreseen with
    a = 0, and a smaller one with the largest a there can be, which is a step without prompts, since that streams the
    weights, too. Either way a pass takes no longer than foreseen, and the size settles where the time is used up.

    Where another kernel takes over for more rows, the time jumps: on AVX2 three tokens of SmolLM2 take 1.5 times as
    long as two. So what sizes took is remembered, and one that took much too long is not tried again for a while.
    """

    def __init__(self) -> None:
        self._rounds: deque[float] = deque(maxlen=_RECENT)
        self._work = self._seconds = 0.0  # of the usual pass: tokens times layers, and time
        self._left = 0.0  # seconds
        self._another = math.inf  # seconds that must be left for another pass
        self._sizes: dict[int, _Size] = {}  # of passes, by their tokens
        self._passes = 0

    def begin_step(self, round_seconds: float | None) -> None:  # noqa: D102
        self._left, self._another = 0.0, math.inf
        if round_seconds is not None:
            self._rounds.append(round_seconds)
            shortest = min(self._rounds)
            self._left = LONGEST_STEP * shortest - round_seconds
            self._another = (LONGEST_STEP + 1 - _GOAL) * shortest

    def next_pass(self, depth: int) -> int:  # noqa: D102
        if self._left < self._another:
            return 0
        fixed = 0.0 if self._left >= self._seconds else min(self._rounds)
        if self._left <= fixed or not self._seconds:
            return 1
        work = self._work * (self._left - fixed) / (self._seconds - fixed)
        return self._without_long_ones(math.ceil(work / depth), depth)

    def _without_long_ones(self, tokens: int, depth: int) -> int:
        """So many tokens, or fewer where that is known to take too long."""
        left = self._left + (_TOO_LONG - LONGEST_STEP) * min(self._rounds)
        since = self._passes - _REMEMBERED
        while tokens > 1 and tokens in self._sizes and self._sizes[tokens].exceeds(left / depth, since):
            tokens -= 1
        return tokens

    def spend(self, tokens: int, depth: int, seconds: float) -> None:  # noqa: D102
        self._left -= seconds
        self._another = seconds
        if tokens:
            weight = _WEIGHT if self._work else 1.0
            self._work += weight * (tokens * depth - self._work)
            self._seconds += weight * (seconds - self._seconds)
            self._passes += 1
            self._sizes.setdefault(tokens, _Size()).add(seconds / depth, self._passes)


class _Size:
    """What passes of one size took, a layer."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_TRIALS)
        self._last = 0

    def add(self, seconds: float, number: int) -> None:
        """Note pass ``number``."""
        self._seconds.append(seconds)
        self._last = number

    def exceeds(self, seconds: float, since: int) -> bool:
        """Whether it took longer, in all trials, the last of them after pass ``since``."""
        return len(self._seconds) == _TRIALS and min(self._seconds) > seconds and self._last > since
