"""The rows of a session's cache: who has one, and what an ended request left there for the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ..models import SharedKVCache
from .reading import PromptReader
from .request import Request


class Slots:
    """Free rows, and rows of ended requests that were kept.

    A kept row stays until it is released or continued, or until a request needs a row and none is free: then the one
    goes that was used least recently.

    Parameters
    ----------
    cache : SharedKVCache
    reader : PromptReader
        Says what of a row may be taken over.

    Attributes
    ----------
    free : list of int
    kept : dict of int to Request
        By the request's id, the least recently used first.
    """

    def __init__(self, cache: SharedKVCache, reader: PromptReader) -> None:
        self._cache, self._reader = cache, reader
        self.free = list(range(cache.batch_size))[::-1]
        self.kept: OrderedDict[int, Request] = OrderedDict()

    @property
    def available(self) -> int:
        """How many requests could have a row now."""
        return len(self.free) + len(self.kept)

    def give_back(self, request: Request, keep: bool = False) -> None:
        """Take back the row of a request; ``keep`` what it holds."""
        if keep:
            self.kept[request.id] = request
        else:
            self.free.append(request.slot)

    def release(self, request_id: int) -> None:
        """Free a row that was kept."""
        self.free.append(self.kept.pop(request_id).slot)

    def place(self, request: Request, others: Iterable[Request]) -> None:
        """Give a request a row, with the longest beginning of its prompt that a row already holds.

        Parameters
        ----------
        request : Request
        others : iterable of Request
            Those that have rows and have not ended.
        """
        source, length = self._longest_beginning(request, [*others, *self.kept.values()])
        if source is not None and self._reader.reads_blocks(request.reading):
            self._complete(source, length)  # first, because it may be interrupted: no row is taken yet
        if request.continues in self.kept:
            assert request.continues is not None
            request.reading.slot = self.kept.pop(request.continues).slot
        elif self.free:
            request.reading.slot = self.free.pop()
        else:
            request.reading.slot = self.kept.popitem(last=False)[1].slot
        if source is None:
            return
        if source.id in self.kept:
            self.kept.move_to_end(source.id)
        reading = request.reading
        if source.slot != reading.slot:
            self._cache.copy_prefix(source.slot, reading.slot, length, reading.depth)
        reading.done = request.sequence.reused = length

    def _complete(self, source: Request, length: int) -> None:
        """Let the blocks of an exit read what a request's row holds of these tokens, if they have not."""
        if source.blocks_done < length:
            self._reader.read_blocks(source.slot, source.all_tokens, source.blocks_done, length)
            source.blocks_done = length

    def _longest_beginning(self, request: Request, others: Sequence[Request]) -> tuple[Request | None, int]:
        """Who holds most of the beginning of a request's prompt, and how many tokens; its last token is never one."""
        best: tuple[Request | None, int] = (None, 0)
        for other in others:
            if other.reading.depth < request.reading.depth:
                continue
            held = _held(other, self._reader.fused)
            length = self._reader.reusable(_common_length(request.tokens[:-1], held))
            if length > best[1] or (length == best[1] > 0 and other.id == request.continues):
                best = other, length
        return best


def _held(request: Request, decoded: bool) -> list[int]:
    """The tokens whose keys and values a request's row holds: of the prompt, and of what was decoded if that counts."""
    if request.reading.left:
        return request.tokens[: request.reading.done]
    return request.tokens + request.sequence.tokens[:-1] if decoded else request.tokens


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first elements are the same."""
    shorter = min(len(left), len(right))
    return next((index for index in range(shorter) if left[index] != right[index]), shorter)
