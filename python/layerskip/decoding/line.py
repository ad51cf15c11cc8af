"""The requests before their first token: some wait for a row of the cache, some are being read."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterator, Sequence

from . import validation
from .budget import PromptBudget
from .reading import PromptReader
from .request import Request
from .sequence import Clock
from .slots import Slots

SHARED_ROWS = 64
"""So many tokens short prompts may have together to share a pass. With more, all would wait for the last one's end."""


class SessionFullError(RuntimeError):
    """As many requests wait as may."""


class PromptLine:
    """First come, first served. Short prompts, of `SHARED_ROWS` tokens together, are read in one pass.

    Parameters
    ----------
    slots : Slots
    reader : PromptReader
    budget : PromptBudget
        Says how much of the prompts a step may read.
    clock : callable
        Gives the time, in seconds, for the budget.
    max_waiting : int, optional
        How many requests may wait beyond those for which there are rows.
    """

    def __init__(
        self, slots: Slots, reader: PromptReader, budget: PromptBudget, clock: Clock, max_waiting: int | None
    ) -> None:
        self._slots, self._reader, self._budget, self._clock = slots, reader, budget, clock
        self._max_waiting = None if max_waiting is None else validation.integer_in("max_waiting", max_waiting, 0)
        self._waiting: deque[Request] = deque()
        self.reading: list[Request] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self.reading)

    def check_room(self) -> None:
        """Raise `SessionFullError` unless one more request may wait."""
        beyond = len(self._waiting) - self._slots.available
        if self._max_waiting is not None and beyond >= self._max_waiting:
            raise SessionFullError(f"max_waiting={self._max_waiting} requests wait; add this one after a step or two")

    def add(self, request: Request) -> None:
        """Let a request wait."""
        self._waiting.append(request)

    def read(self, running: Collection[Request]) -> Iterator[tuple[Request, Exception | None]]:
        """Read prompts, as many tokens as the budget of the step has left, or any number while nothing runs.

        Parameters
        ----------
        running : collection of Request
            Those that run; whoever calls adds to it what is yielded.

        Yields
        ------
        (Request, Exception or None)
            One whose prompt is read, or cannot be. It stays in the line until `leave` or `fail`, and as long it is
            yielded again by later calls.

        Raises
        ------
        RuntimeError
            If requests wait, and no row is free or in use: a caller would wait for ever.
        """
        while readings := self._admit(running):
            depth = readings[0].reading.depth
            most = self._budget.next_pass(depth) if running else sys.maxsize
            if most == 0:
                return
            started = self._clock()
            read, failures = self._read_pass(readings, most)
            self._budget.spend(read, depth, self._clock() - started)
            yield from failures
            for request in [one for one in readings if one.reading.left == 0]:
                yield request, None
        if self and not running:
            raise RuntimeError(f"{len(self)} requests wait, and no slot is free or in use")

    def _read_pass(self, requests: Sequence[Request], most: int) -> tuple[int, list[tuple[Request, Exception]]]:
        """Read the next tokens of some prompts: how many, and what cannot be read, which is at most one of them."""
        unread = [request for request in requests if request.reading.left]  # not so after an interrupt
        if not unread:
            return 0, []
        try:
            return self._reader.read([request.reading for request in unread], most), []
        except Exception as error:
            if len(unread) > 1:
                return self._read_pass(unread[:1], most)
            return 0, [(unread[0], error)]

    def _admit(self, running: Collection[Request]) -> list[Request]:
        """The requests whose prompts are read next: the first that waits, and others if they are short.

        A prompt gets its row as late as this, because by then the one before it may hold its beginning.
        """
        tokens = sum(request.reading.left for request in self.reading)
        while self._waiting and self._slots.available:
            first = self._waiting[0]
            tokens += first.reading.left
            if self.reading and not (self._shares_a_pass(first) and tokens <= SHARED_ROWS):
                break
            self._slots.place(first, [*running, *self.reading])
            self.reading.append(self._waiting.popleft())
        return self.reading

    def _shares_a_pass(self, request: Request) -> bool:
        return self._reader.fused and request.reading.depth == self.reading[0].reading.depth

    def take(self, request_id: int) -> Request | None:
        """Take a request out; a row that it has is free again."""
        for request in self.reading:
            if request.id == request_id:
                self.fail(request)
                return request
        for request in self._waiting:
            if request.id == request_id:
                self._waiting.remove(request)
                return request
        return None

    def fail(self, request: Request) -> None:
        """Let a request go whose prompt will not be read; its row is free again."""
        self.leave(request)
        self._slots.give_back(request)

    def leave(self, request: Request) -> None:
        """Let a request go with its row."""
        self.reading.remove(request)
