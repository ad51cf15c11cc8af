"""Scheduler: waiting queue, slots of the KV cache, chunked prefill and its budget."""

from __future__ import annotations

import itertools
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import explain

from .._autograd_modes import InferenceMode
from ..devices import to_device
from ..models import LayerSkipModel, SharedKVCache
from . import validation
from .request import Clock, Request

LONGEST_STEP = 2.25
"""Target length of a step with prefill, over that of a step without; `_GOAL` is the limit, and times vary."""
_GOAL = 3.0
_TOO_LONG = 2.4  # times: a chunk size known to make a step this long is not tried again
_RECENT = 8  # steps; their shortest round is the step without prefill, because a single one may be disturbed
_WEIGHT = 0.5  # of a new chunk in the usual one
_TRIALS = 2  # of a chunk size; the shorter one counts, because one may be disturbed
_REMEMBERED = 256  # chunks, after which a size that took too long is tried again

FUSED_ROWS = 256
"""Largest chunk of the fused layers. SmolLM2 in bf16 on two cores of a Zen 5 reads 4096 tokens in 2.49 s with 64 rows,
2.31 with 128, 2.27 with 192 and 2.21 with 256."""
TORCH_ROWS = 256
"""Chunk of torch's matmuls. 512 rows are as fast, 128 a tenth slower."""
SHARED_ROWS = 64
"""Total length of short prompts that share a chunk. With more, all would wait for the end of the last one."""


class SessionFullError(RuntimeError):
    """``max_waiting`` requests wait."""


def prefill_budget(tokens_per_step: int | str | None) -> TokenBudget:
    """Return a `TimeBudget` for "auto", else a `TokenBudget`, without a limit for None."""
    if tokens_per_step == "auto":
        return TimeBudget()
    limit = sys.maxsize if tokens_per_step is None else tokens_per_step
    return TokenBudget(validation.at_least_one("prompt_tokens_per_step", limit))


class TokenBudget:
    """Prefill budget of a step, in tokens."""

    def __init__(self, tokens_per_step: int = sys.maxsize) -> None:
        self._per_step = self._tokens_left = tokens_per_step

    def begin_step(self, round_seconds: float | None) -> None:
        """Reset the budget after the step's rounds, which took so long; None: nothing ran."""
        self._tokens_left = self._per_step

    def next_chunk(self, num_layers: int) -> int:
        """Return the largest next chunk, through ``num_layers`` layers; 0 ends the step."""
        return max(0, self._tokens_left)

    def spend(self, num_tokens: int, num_layers: int, seconds: float) -> None:
        """Record a chunk, even one that was read without a limit because nothing ran."""
        self._tokens_left -= num_tokens


class TimeBudget(TokenBudget):
    """Prefill budget that keeps a step within `LONGEST_STEP`, or one token more, so that the chunk can grow from one.

    One token always fits after the shortest of the recent rounds, so prefill never stops. After a disturbed round, or
    one of many more requests, even one token may exceed `_GOAL`: then the step prefills nothing.

    A chunk of n tokens takes a + b n seconds: it streams the weights once, then computes. Which part dominates depends
    on the machine, so both are bounded instead of fitted. A chunk larger than the usual one is predicted with a = 0, a
    smaller one with the largest possible a: a step without prefill, which streams the weights, too. Neither takes
    longer than predicted, and the size settles where the time is used up.

    Where another kernel takes over, the time jumps: on AVX2 three tokens of SmolLM2 take 1.5 times as long as two. So
    the times of sizes are remembered, and a size that took too long is not tried again for a while.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rounds: deque[float] = deque(maxlen=_RECENT)
        self._work = self._seconds = 0.0  # of the usual chunk: tokens times layers, and time
        self._left = 0.0  # seconds
        self._another = math.inf  # seconds that must be left for another chunk
        self._trials: dict[int, deque[float]] = {}  # seconds a layer of the last chunks, by size
        self._last: dict[int, int] = {}  # number of the last chunk, by size
        self._chunks = 0

    def begin_step(self, round_seconds: float | None) -> None:
        self._left, self._another = 0.0, math.inf
        if round_seconds is not None:
            self._rounds.append(round_seconds)
            shortest = min(self._rounds)
            self._left = LONGEST_STEP * shortest - round_seconds
            self._another = (LONGEST_STEP + 1 - _GOAL) * shortest

    def next_chunk(self, num_layers: int) -> int:
        if self._left < self._another:
            return 0
        fixed = 0.0 if self._left >= self._seconds else min(self._rounds)
        if self._left <= fixed or not self._seconds:
            return 1
        num_tokens = math.ceil(self._work * (self._left - fixed) / (self._seconds - fixed) / num_layers)
        limit = (self._left + (_TOO_LONG - LONGEST_STEP) * min(self._rounds)) / num_layers
        while num_tokens > 1 and self._takes_longer(num_tokens, limit):
            num_tokens -= 1
        return num_tokens

    def _takes_longer(self, num_tokens: int, seconds: float) -> bool:
        """Whether all recent trials of a chunk size took longer, a layer."""
        trials = self._trials.get(num_tokens, ())
        recent = self._last.get(num_tokens, 0) > self._chunks - _REMEMBERED
        return recent and len(trials) == _TRIALS and min(trials) > seconds

    def spend(self, num_tokens: int, num_layers: int, seconds: float) -> None:
        self._left -= seconds
        self._another = seconds
        if num_tokens:
            weight = _WEIGHT if self._work else 1.0
            self._work += weight * (num_tokens * num_layers - self._work)
            self._seconds += weight * (seconds - self._seconds)
            self._chunks += 1
            self._trials.setdefault(num_tokens, deque(maxlen=_TRIALS)).append(seconds / num_layers)
            self._last[num_tokens] = self._chunks


class ChunkedPrefill:
    """Runs prompts through the layers, chunk by chunk, into their slots. The chunks do not change the result.

    The fused layers of the native CPU library give a row the same bits whatever is computed with it. So chunks may have
    any size and hold several prompts, decoded tokens count as read, and any cached prefix may be reused.

    Elsewhere torch's matmuls read prompts; on a GPU they are made for many rows. Their rounding depends on the number
    of rows. So each prompt is read alone and always cut at multiples of `TORCH_ROWS`, and only whole parts between two
    cuts of a prompt may be reused.
    """

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache) -> None:
        self._model, self._cache = model, cache

    @property
    def fused(self) -> bool:
        """Whether the fused layers read prompts."""
        return explain("partial_forward", self._model.embedding).backend == "cpu"

    def reusable(self, num_tokens: int) -> int:
        """Return how many of the first tokens that a slot and a prompt share may be reused."""
        return num_tokens if self.fused else num_tokens // TORCH_ROWS * TORCH_ROWS

    def run(self, requests: Sequence[Request], limit: int = sys.maxsize) -> int:
        """Run one chunk of at most ``limit`` tokens and return its size; torch's matmuls read up to the next cut.

        The requests have unread tokens and the same layers; where torch's matmuls read, there is one.
        """
        with InferenceMode(True):
            return self._run(requests, limit)

    def _run(self, requests: Sequence[Request], limit: int) -> int:
        model, first = self._model, requests[0]
        layers: dict[str, Any] = {
            "num_layers": first.num_layers,
            "draft_layers": first.num_prefill_layers > first.num_layers,
        }
        if not self.fused:
            row, end = self._cache.slot(first.slot), (first.num_prefilled // TORCH_ROWS + 1) * TORCH_ROWS
            tokens = first.prompt_ids[:, first.num_prefilled : end]
            row.seq_lens.fill_(first.num_prefilled)
            _advance(first, model.prefill(tokens, row, **layers))
            return tokens.numel()
        limit = min(limit, FUSED_ROWS)
        requests = requests[:limit]
        rows = min(max(1, limit // len(requests)), *(request.num_unread for request in requests))
        tokens = torch.cat([one.prompt_ids[:, one.num_prefilled : one.num_prefilled + rows] for one in requests])
        places = [[request.num_prefilled for request in requests], [request.slot for request in requests]]
        seq_lens, slots = to_device(torch.tensor(places), model.device).unbind()
        hidden = model.read(tokens, self._cache, **layers, seq_lens=seq_lens, slots=slots)
        for index, request in enumerate(requests):
            _advance(request, hidden[index : index + 1])
        return tokens.numel()


def _advance(request: Request, hidden: Tensor) -> None:
    """Record that a chunk gave a prompt's states [1, M, D]."""
    request.last_hidden = hidden[:, -1]
    request.num_prefilled += hidden.shape[1]


def catch_up_draft_layers(model: LayerSkipModel, cache: SharedKVCache, request: Request, end: int) -> None:
    """Run an exit's draft layers on the tokens before ``end`` that they have not read.

    They read nothing during rounds of lookup drafts, which so cost nothing for an exit that is not used. Layers [0, E)
    run again, with the same bits.
    """
    tokens = request.all_tokens
    with InferenceMode(True):
        for begin in range(request.num_draft_cached, end, FUSED_ROWS):
            chunk = to_device(torch.tensor([tokens[begin : min(begin + FUSED_ROWS, end)]]), model.device)
            seq_lens, slots = to_device(torch.tensor([[begin], [request.slot]]), model.device).unbind()
            model.read(chunk, cache, model.exit_layer, draft_layers=True, seq_lens=seq_lens, slots=slots)
    request.num_draft_cached = max(request.num_draft_cached, end)


class Scheduler:
    """Decides which requests wait, are prefilled and run, and which slot of the KV cache each has.

    The highest priority first; of equals, first come, first served. Short prompts, of `SHARED_ROWS` tokens together,
    are prefilled in one chunk. A request gets its slot when its prefill starts, with the longest cached prefix of its
    prompt.

    A slot is free once its request has ended, unless the request is retained for its cached prefix, until it is
    released or continued, or until another needs a slot and none is free: then the least recently used one goes. All of
    this is derived from ``slots`` and the requests' own state, so no interrupt can lose a slot or give it away twice.
    """

    def __init__(
        self, model: LayerSkipModel, cache: SharedKVCache, budget: TokenBudget, clock: Clock, max_waiting: int | None
    ) -> None:
        self._model, self._cache, self._clock = model, cache, clock
        self._max_waiting = None if max_waiting is None else validation.integer_in("max_waiting", max_waiting, 0)
        self.budget, self.prefill = budget, ChunkedPrefill(model, cache)
        self.waiting: dict[int, Request] = {}  # in the order of arrival
        self.slots: list[Request | None] = [None] * cache.batch_size  # the last request of each
        self._uses = itertools.count(1)

    def __iter__(self) -> Iterator[Request]:
        """All requests that have not ended."""
        waiting = (one for one in self.waiting.values() if one.reason is None)
        return itertools.chain(waiting, self.prefilling, self.running)

    @property
    def running(self) -> list[Request]:
        return [one for one in self.slots if one is not None and one.running]

    @property
    def prefilling(self) -> list[Request]:
        """Requests with a slot and without a token, the first that came first."""
        prefilling = [one for one in self.slots if one is not None and not one.started and one.reason is None]
        return sorted(prefilling, key=lambda one: one.id)

    @property
    def retained(self) -> dict[int, Request]:
        """Ended requests whose slots are kept, by id, the least recently used first."""
        retained = [one for one in self.slots if one is not None and one.retained]
        return {one.id: one for one in sorted(retained, key=lambda one: one.last_used)}

    @property
    def free_slots(self) -> list[int]:
        owners = enumerate(self.slots)
        return [slot for slot, one in owners if one is None or (one.reason is not None and not one.retained)]

    def check_room(self) -> None:
        """Raise `SessionFullError` unless one more request may wait."""
        beyond = len(self.waiting) - len(self.free_slots) - len(self.retained)
        if self._max_waiting is not None and beyond >= self._max_waiting:
            raise SessionFullError(f"max_waiting={self._max_waiting} requests wait; add this one after a step or two")

    def find(self, request_id: int) -> Request:
        """Return a request that has not ended."""
        for request in self:
            if request.id == request_id:
                return request
        raise ValueError(f"request_id must be that of a request that has not ended, got {request_id!r}")

    def touch(self, request: Request) -> None:
        """Make a slot the most recently used one."""
        request.last_used = next(self._uses)

    def sweep(self) -> None:
        """Drop waiting requests that have ended, or have a slot since an interrupt."""
        waiting = self.waiting.items()
        self.waiting = {key: one for key, one in waiting if one.reason is None and one not in self.slots}

    def run_prefill(self) -> Iterator[tuple[Request, Exception | None]]:
        """Prefill within the budget of the step, or without a limit while nothing runs.

        Yield the requests whose prefill is complete, or has failed; later calls yield them again until they are started
        or have ended. RuntimeError if requests wait and no slot is free or in use: they would wait forever.
        """
        while requests := self._admit():
            num_layers = requests[0].num_prefill_layers
            limit = self.budget.next_chunk(num_layers) if self.running else sys.maxsize
            if limit == 0:
                return
            started = self._clock()
            num_tokens, failed = self._run_chunk(requests, limit)
            self.budget.spend(num_tokens, num_layers, self._clock() - started)
            yield from failed
            for request in [one for one in requests if one.num_unread == 0]:
                yield request, None
        if self.waiting and not self.running:
            raise RuntimeError(f"{len(self.waiting)} requests wait, and no slot is free or in use")

    def _run_chunk(self, requests: Sequence[Request], limit: int) -> tuple[int, list[tuple[Request, Exception]]]:
        """Run a chunk; return its tokens, and the request that failed, if any."""
        unread = [request for request in requests if request.num_unread]  # not all, after an interrupt
        if not unread:
            return 0, []
        try:
            return self.prefill.run(unread, limit), []
        except Exception as error:
            if len(unread) > 1:
                return self._run_chunk(unread[:1], limit)
            return 0, [(unread[0], error)]

    def _admit(self) -> list[Request]:
        """Return the requests to prefill next: the first that waits, and others if they are short.

        A request gets its slot this late because the one before it may have cached its prefix by then.
        """
        prefilling = self.prefilling
        num_tokens = sum(request.num_unread for request in prefilling)
        while self.waiting and (slots := self.free_slots or [one.slot for one in self.retained.values()]):
            first = max(self.waiting.values(), key=lambda one: one.priority)  # of equals the first that came
            num_tokens += first.num_unread
            if prefilling and not (
                self.prefill.fused
                and first.num_prefill_layers == prefilling[0].num_prefill_layers
                and num_tokens <= SHARED_ROWS
            ):
                break
            self._allocate_slot(first, slots[0])
            del self.waiting[first.id]
            prefilling.append(first)
        return prefilling

    def _allocate_slot(self, request: Request, slot: int) -> None:
        """Give a request a slot, or the one that it continues, with the longest cached prefix of its prompt."""
        source, length = self._longest_prefix(request)
        if source is not None and request.num_prefill_layers > request.num_layers and source.num_draft_cached < length:
            catch_up_draft_layers(self._model, self._cache, source, length)
        if request.continue_from in (retained := self.retained):
            slot = retained[request.continue_from].slot
        if source is not None:
            self.touch(source)
            if source.slot != slot:
                if (evicted := self.slots[slot]) is not None:
                    evicted.keep = False  # before its keys and values are overwritten
                self._cache.copy_prefix(source.slot, slot, length, request.num_prefill_layers)
        request.num_prefilled = request.num_reused = length
        request.slot = slot
        self.slots[slot] = request

    def _longest_prefix(self, request: Request) -> tuple[Request | None, int]:
        """Return the request that has cached most of a prompt's prefix, and its length; the last token never counts."""
        best: tuple[Request | None, int] = (None, 0)
        for other in [*self.running, *self.prefilling, *self.retained.values()]:
            if other.num_prefill_layers < request.num_prefill_layers:
                continue
            shared = _num_shared(request.prompt_tokens[:-1], other.cached_tokens(with_decoded=self.prefill.fused))
            length = self.prefill.reusable(shared)
            if length > best[1] or (length == best[1] > 0 and other.id == request.continue_from):
                best = other, length
        return best


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading tokens are equal."""
    shorter = min(len(left), len(right))
    return next((index for index in range(shorter) if left[index] != right[index]), shorter)
