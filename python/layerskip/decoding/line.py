"""The requests before their first token: some wait for a row of the cache, some are being read."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from . import validation
from .reading import FUSED_ROWS, PromptReader
from .request import Request
from .slots import Slots


class SessionFullError(RuntimeError):
    """As many requests wait as may."""


class PromptLine:
    """First come, first served. Short prompts, of `FUSED_ROWS` tokens together, are read in one pass.

    Parameters
    ----------
    slots : Slots
    reader : PromptReader
    max_waiting : int, optional
        How many requests may wait beyond those for which there are rows.
    """

    def __init__(self, slots: Slots, reader: PromptReader, max_waiting: int | None) -> None:
        self._slots, self._reader = slots, reader
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

    def admit(self, running: Collection[Request]) -> list[Request]:
        """The requests whose prompts are read next: the first that waits, and others if they are short.

        A prompt gets its row as late as this, because by then the one before it may hold its beginning.
        """
        tokens = sum(request.reading.left for request in self.reading)
        while self._waiting and self._slots.available:
            first = self._waiting[0]
            tokens += first.reading.left
            if self.reading and not (self._shares_a_pass(first) and tokens <= FUSED_ROWS):
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
