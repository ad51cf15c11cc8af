"""Clocks for decoding: when tokens arrive, and how much of the time is spent inside the ops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from layerskip_kernels import dispatch


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


class OpClock:
    """Adds up the seconds that implementations of ops take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@contextmanager
def op_clock() -> Iterator[OpClock]:
    """Time every op on every backend within a ``with`` block. Meaningful on the CPU, where ops are synchronous."""
    clock = OpClock()
    before = dispatch.implementations()
    for op, backends in before.items():
        for backend, implementation in backends.items():
            timed = replace(implementation, function=clock.around(implementation.function))
            dispatch.register(op, backend, timed)
    try:
        yield clock
    finally:
        for op, backends in before.items():
            for backend, implementation in backends.items():
                dispatch.register(op, backend, implementation)


@dataclass
class OpShare(Stopwatch):
    """A stopwatch that also notes the op clock when the first and the last tokens arrive."""

    clock: OpClock = field(default_factory=OpClock)
    op_seconds_at: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """As `Stopwatch.put`."""
        super().put(value)
        if self.arrivals:
            self.op_seconds_at.append(self.clock.seconds)

    @property
    def op_seconds(self) -> float:
        """Seconds inside ops between the first and the last arrival."""
        return self.op_seconds_at[-1] - self.op_seconds_at[0]
