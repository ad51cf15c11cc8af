"""Scheduler: waiting queue, slots of the KV cache, chunked prefill and its budget."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from layerskip_kernels import explain

from ..devices import to_device
from ..models import LayerSkipModel, SharedKVCache
from . import validation
from .request import Clock, Reading, Request

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

    def begin_step(self, round_seconds: float | None) -> None:
        self._left = self._most

    def next_pass(self, depth: int) -> int:
        return max(0, self._left)

    def spend(self, tokens: int, depth: int, seconds: float) -> None:
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

    def begin_step(self, round_seconds: float | None) -> None:
        self._left, self._another = 0.0, math.inf
        if round_seconds is not None:
            self._rounds.append(round_seconds)
            shortest = min(self._rounds)
            self._left = LONGEST_STEP * shortest - round_seconds
            self._another = (LONGEST_STEP + 1 - _GOAL) * shortest

    def next_pass(self, depth: int) -> int:
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

    def spend(self, tokens: int, depth: int, seconds: float) -> None:
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


FUSED_ROWS = 256
"""The most rows of a pass through the fused layers. SmolLM2 in bf16 on two cores of a Zen 5 reads 4096 tokens in 2.49 s
with 64 rows, 2.31 with 128, 2.27 with 192 and 2.21 with 256."""
TORCH_ROWS = 256
"""The rows of a pass of torch's matmuls. With 512 rows it is as fast, with 128 a tenth slower."""


class PromptReader:
    """Runs prompts through the layers, pass by pass, into the rows of a cache. The passes do not change the result.

    Where the native CPU library serves them, the fused layers read prompts. They give a row the same bits whatever is
    computed with it. So a pass may have any number of tokens and hold several prompts, what was decoded counts as
    read, and any prefix that the cache holds may be taken over. They are not slower than torch's matmuls, either.

    Elsewhere torch's matmuls do it, on a card because they are made for many rows. Their rounding depends on the number
    of rows. So each prompt is read alone and is always cut at the multiples of `TORCH_ROWS`, and only whole parts
    between two cuts that were read as a prompt may be taken over.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    """

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache) -> None:
        self._model, self._cache = model, cache

    @property
    def fused(self) -> bool:
        """Whether the fused layers read prompts."""
        return explain("partial_forward", self._model.embedding).backend == "cpu"

    def _depth(self, reading: Reading) -> dict[str, Any]:
        """Which layers read a prompt, as `LayerSkipModel.read` takes it."""
        layers = self._model.num_layers
        return {"end": min(reading.depth, layers), "draft_layers": self.reads_draft_layers(reading)}

    def reusable(self, length: int) -> int:
        """How many of ``length`` tokens that were read as part of one prompt can stand for those of another."""
        return length if self.fused else length // TORCH_ROWS * TORCH_ROWS

    def reads_draft_layers(self, reading: Reading) -> bool:
        """Whether an exit's draft layers read a prompt, too."""
        return reading.depth > self._model.num_layers

    def read_draft_layers(self, slot: int, tokens: Sequence[int], done: int, end: int) -> None:
        """See `read_draft_layers`."""
        read_draft_layers(self._model, self._cache, slot, tokens, done, end)

    def read(self, readings: Sequence[Reading], most: int = sys.maxsize) -> int:
        """Run one pass over the next tokens of some prompts; return how many tokens it read.

        Parameters
        ----------
        readings : sequence of Reading
            Of one depth, each with tokens left, and only one where torch's matmuls read.
        most : int
            The most tokens to read; torch's matmuls read up to the next cut in any case.
        """
        with torch.inference_mode():
            return self._read_fused(readings, most) if self.fused else self._read_with_torch(readings[0])

    def _read_fused(self, readings: Sequence[Reading], most: int) -> int:
        model, most = self._model, min(most, FUSED_ROWS)
        readings = readings[:most]
        rows = min(max(1, most // len(readings)), *(reading.left for reading in readings))
        tokens = torch.cat([reading.prompt[:, reading.done : reading.done + rows] for reading in readings])
        places = [[reading.done for reading in readings], [reading.slot for reading in readings]]
        seq_lens, slots = to_device(torch.tensor(places), model.device).unbind()
        hidden = model.read(tokens, self._cache, **self._depth(readings[0]), seq_lens=seq_lens, slots=slots)
        for index, reading in enumerate(readings):
            _advance(reading, rows, hidden[index : index + 1])
        return tokens.numel()

    def _read_with_torch(self, reading: Reading) -> int:
        model, row = self._model, self._cache.slot(reading.slot)
        end = (reading.done // TORCH_ROWS + 1) * TORCH_ROWS
        tokens = reading.prompt[:, reading.done : end]
        row.seq_lens.fill_(reading.done)
        hidden = model.prefill(tokens, row, **self._depth(reading))
        _advance(reading, tokens.shape[1], hidden)
        return tokens.numel()


def _advance(reading: Reading, rows: int, hidden: Tensor) -> None:
    """Note that so many tokens were read, which gave the states [1, rows, D]."""
    reading.state = hidden[:, -1]
    reading.done += rows


@torch.inference_mode()
def read_draft_layers(
    model: LayerSkipModel, cache: SharedKVCache, slot: int, tokens: Sequence[int], done: int, end: int
) -> None:
    """Let an exit's draft layers read ``tokens[done:end]``, which the model's own layers have read before.

    While others draft, draft layers read nothing: rounds that look drafts up cost nothing for an exit that is not used.
    Layers [0, E) run again, to the same bits.
    """
    exit_layer, device = model.exit_layer, model.device
    for begin in range(done, end, FUSED_ROWS):
        some = to_device(torch.tensor([tokens[begin : min(begin + FUSED_ROWS, end)]]), device)
        seq_lens, slots = to_device(torch.tensor([[begin], [slot]]), device).unbind()
        model.read(some, cache, exit_layer, draft_layers=True, seq_lens=seq_lens, slots=slots)


def read_prompt(model: LayerSkipModel, cache: SharedKVCache, slot: int, prompt: Tensor, depth: int) -> Tensor:
    """Run a whole ``prompt`` [1, N] through layers [0, depth) into one row of the cache; its last state [1, D]."""
    reader, reading = PromptReader(model, cache), Reading(prompt, depth, slot)
    while reading.left:
        reader.read([reading])
    assert reading.state is not None
    return reading.state


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
        if source is not None and self._reader.reads_draft_layers(request.reading):
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
        """Let the draft layers of an exit read what a request's row holds of these tokens, if they have not."""
        if source.draft_layers_done < length:
            self._reader.read_draft_layers(source.slot, source.all_tokens, source.draft_layers_done, length)
            source.draft_layers_done = length

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
