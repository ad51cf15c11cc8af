"""A clock for decoding: when tokens arrive."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Stopwatch:
    """A streamer that notes when each group of tokens arrives; any ``generate`` takes it, ours or transformers'."""

    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """The first call is the prompt, the others are new tokens."""
        now = time.perf_counter()
        if not self.started:
            self.started = now
            return
        self.arrivals.append(now)
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing follows."""

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.arrivals[0] - self.started

    @property
    def first_tokens(self) -> int:
        """New tokens of the first group."""
        return self.counts[0]

    @property
    def tokens(self) -> int:
        """New tokens after the first group, whose time is the prompt's."""
        return sum(self.counts[1:])

    @property
    def seconds(self) -> float:
        """From the first group of new tokens to the last."""
        return self.arrivals[-1] - self.arrivals[0]
