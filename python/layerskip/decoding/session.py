"""Continuous batching: requests with their own prompt, end and pace share a KV cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..models import LayerSkipModel, SharedKVCache
from . import validation
from .adaptive import Choice, Controller
from .batch import Batch, Launched, sequences_of, spec_step_of
from .cuda_graphs import Graphs, warn_unrecorded
from .draft_sources import DraftSource
from .outputs import Streamer, Update
from .request import Clock, DraftKind, Request, RequestOptions, RoundKind, StopRule
from .sampling import History, LogitsProcessor, SamplingParams, params_of, seed_of
from .scheduler import Scheduler, prefill_budget
from .spec_step import NOT_DRAFTED


class Session:
    """Requests that share a KV cache, see `SelfSpeculativeDecoder.open_session`.

    A request gets, bit for bit, the tokens that it would get alone. Every running request has a slot of the cache; the
    others wait, first come first served. Prompts are prefilled in chunks between the rounds of running requests, and a
    prefix that is in the cache already is copied.

    ``cache`` has room for ``max_seq_len`` and ``max_speculations`` + 1 positions in every slot; ``graphs`` records the
    rounds over it. The other parameters are those of `SelfSpeculativeDecoder.open_session`.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        defaults: RequestOptions,
        controller: Controller,
        max_seq_len: int,
        max_speculations: int,
        generator: torch.Generator | None = None,
        clock: Clock = time.perf_counter,
        graphs: Graphs | None = None,
        prompt_tokens_per_step: int | str | None = None,
        max_waiting: int | None = None,
    ) -> None:
        self._model, self._cache, self._defaults, self._controller = model, cache, defaults, controller
        self.max_seq_len, self.max_speculations = max_seq_len, max_speculations
        self._generator, self._clock, self._graphs = generator, clock, graphs
        self._ids = itertools.count()
        self._scheduler = Scheduler(model, cache, prefill_budget(prompt_tokens_per_step), clock, max_waiting)
        self._updates: dict[int, Update] = {}  # by request: what no `step` has returned yet
        self._batches: list[Batch] = []
        self._batches_valid = False  # whether they are those of the running requests

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session can't be pickled or copied: it is requests in progress, on a cache")

    def __len__(self) -> int:
        """Number of requests without their last update."""
        return len(self._scheduler) + sum(update.finished for update in self._updates.values())

    def add(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int = 128,
        *,
        strategy: str = "self_speculative",
        exit_layer: int | str | None = None,
        num_speculations: int | str | None = None,
        draft_threshold: float | None = None,
        draft_source: str | DraftSource | None = None,
        sampling: SamplingParams | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: LogitsProcessor | None = None,
        should_stop: StopRule | None = None,
        keep: bool = False,
        continue_from: int | None = None,
    ) -> int:
        """Add a request, which waits until a slot is free.

        Parameters
        ----------
        prompt : Tensor [N] or [1, N], or sequence of int
            With ``continue_from``, the tokens after that request's prompt and new tokens.
        max_new_tokens : int
        strategy : {"self_speculative", "autoregressive", "early_exit"}
            The first two give the same greedy tokens. "early_exit" decodes with layers [0, E) alone, unverified.
        exit_layer, num_speculations : int or "auto", optional
            By default the decoder's. "auto": a `Controller` picks, round by round.
        draft_threshold : float, optional
            In [0, 1]; by default the decoder's. A greedy draft ends before the first token less probable than this, a
            sampled draft after it, which keeps the distribution.
        draft_source : {"exit", "ngram", "auto"} or DraftSource, optional
            By default the decoder's. "exit": layers [0, E). "ngram": earlier text, see `NgramSource`. "auto": a
            `Controller` picks the faster one, or none, round by round.
        sampling : SamplingParams, optional
            By default greedy.
        eos_token_id : int or sequence of int, optional
            By default the decoder's; an empty list for none.
        logits_processor : callable, optional
            ``(history [n], logits [V]) -> logits [V]``, for every drafted and verified position; ``history`` are all
            tokens before it, drafts included. It must not keep or change its arguments. It is applied after bias and
            repetition penalty and before the temperature.
        should_stop : callable, optional
            ``(all new tokens so far) -> bool``, called for every emitted token. Hooks must not call the session.
        keep : bool
            Retain keys and values after the end, unless it is an error, for requests that continue it or share a
            prefix. They are dropped by `release`, by a request that continues it, or when a slot is needed, the least
            recently used first.
        continue_from : int, optional
            Id of a retained request. It is no longer retained once this one is prefilled.

        Returns
        -------
        int
            Id of the request.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        SessionFullError
            If ``max_waiting`` requests wait.
        """
        model = self._model
        options = self._defaults.updated(
            model, self.max_speculations, strategy=strategy, exit_layer=exit_layer, num_speculations=num_speculations,
            draft_threshold=draft_threshold, draft_source=draft_source, eos_token_id=eos_token_id,
        )  # fmt: skip
        ids = validation.prompt(prompt, model.vocab_size, model.device)
        if continue_from is not None:
            ids = torch.cat([self._retained(continue_from).all_ids, ids], 1)
        validation.at_least_one("max_new_tokens", max_new_tokens)
        validation.length(ids.shape[1], max_new_tokens, self.max_seq_len)
        params = params_of(sampling, model.vocab_size)
        stop_tokens = validation.stop_tokens(options.eos_token_id, model.vocab_size)
        self._scheduler.check_room()
        model.refresh()  # weights may have been changed in place since the session was opened
        request = Request(
            next(self._ids), model, options, ids, max_new_tokens, params, seed_of(params, self._generator),
            self._controller.new_acceptance(), stop_tokens, should_stop, logits_processor, keep, continue_from,
            self._clock,
        )  # fmt: skip
        if logits_processor is not None:
            request.history = History(ids, max_new_tokens + self.max_speculations + 1)
            if self._graphs is not None:
                warn_unrecorded(logits_processor)
        self._scheduler.waiting.append(request)
        return request.id

    def step(self) -> list[Update]:
        """Run one round of every running request, then prefill waiting requests into free slots.

        While requests run, ``prompt_tokens_per_step`` limits the prefill. Recorded rounds run ahead: a step launches
        the next one before it waits for its own.

        If an exception (an interrupt, say) leaves a step, nothing is lost: the next step continues, and returns the
        updates of both.

        Returns
        -------
        list of Update
            At most one for each request.
        """
        started = self._clock()
        try:
            if self._graphs is not None:
                self._graphs.follow()
            running = list(self._scheduler.running.values())
            for request in running:
                if request.interrupted:
                    self._emit(request, request.emit_pending)
            self._look_up_drafts()
            batches = self._current_batches()
            for batch in batches:
                self._collect(batch, *batch.run())
            self._scheduler.budget.begin_step(self._clock() - started if batches else None)
            self._prefill()
        except BaseException:
            # Their tensors may be ahead of the requests' tokens. Rounds that were launched and not read are repeated.
            self._batches, self._batches_valid = [], False
            raise
        updates, self._updates = self._updates, {}
        return list(updates.values())

    def run(self, streamer: Streamer | None = None) -> Iterator[Update]:
        """Step until all requests have ended; raise the error of a request that fails. ``streamer`` gets new tokens."""
        while len(self):
            for update in self.step():
                if update.error is not None:
                    raise update.error
                if streamer is not None:
                    streamer.put(torch.tensor(update.tokens))
                yield update
        if streamer is not None:
            streamer.end()

    def cancel(self, request_id: int) -> None:
        """End a request. The next step's update of it has the reason "cancelled" and the output so far."""
        request = self._scheduler.remove(request_id, retain=True)
        self._batches_valid = False
        request.reason = "cancelled"
        self._report(request)

    def remove(self, request_id: int) -> None:
        """Drop a request at once, without an update."""
        pending = self._updates.get(request_id)  # of an interrupted step
        if pending is None or not pending.finished:
            self._scheduler.remove(request_id)
            self._batches_valid = False
        self._updates.pop(request_id, None)

    def release(self, request_id: int) -> None:
        """Drop the keys and values of a retained request."""
        self._scheduler.release(self._retained(request_id).id)

    @property
    def kept(self) -> tuple[int, ...]:
        """Ids of the retained requests, the least recently used first."""
        return tuple(self._scheduler.retained)

    def _retained(self, request_id: int) -> Request:
        if request_id not in self._scheduler.retained:
            raise ValueError(f"request {request_id!r} is not kept, these are: {list(self.kept)}")
        return self._scheduler.retained[request_id]

    # Rounds

    def _look_up_drafts(self) -> None:
        """Ask the requests' draft sources; a source that fails ends its own request only."""
        for request in list(self._scheduler.running.values()):
            try:
                request.look_up(self.max_speculations)
            except Exception as error:
                self._emit(request, error=error)

    def _current_batches(self) -> list[Batch]:
        """Return the running requests, grouped by the kind of their next round."""
        running = self._scheduler.running
        if _choose(running.values(), self._controller):
            self._batches_valid = False
        if not self._batches_valid:
            for batch in self._batches:  # collect what was launched before a request joined, left, or changed its kind
                if batch.under_way and any(request.id in running for request in batch.requests):
                    self._collect(batch, *batch.read())
            self._batches = [
                Batch(self._model, self._cache, kind, requests, self._graphs, self._scheduler.free_slots, self._clock)
                for kind, requests in _by_kind(running.values()).items()
            ]
            self._batches_valid = True
        return self._batches

    def _collect(self, batch: Batch, launched: Launched, results: Sequence[list[int]]) -> None:
        """Collect a finished round: its cost, and the tokens of every request."""
        adaptive = any(request.options.adaptive for request in batch.requests)
        if adaptive and launched.draft_kind is not DraftKind.MIXED and not launched.caught_up:
            exit_layer = batch.kind.exit_layer if launched.draft_kind is DraftKind.EXIT else None
            choice = Choice(exit_layer, launched.num_speculations)
            self._controller.observe_cost(choice, len(batch.requests), launched.outcome.seconds)
        failures = batch.failures
        for index, (request, result) in enumerate(zip(batch.requests, results, strict=True)):
            if request.id in self._scheduler.running:
                self._collect_request(batch.kind, request, result, failures.get(index))

    def _collect_request(self, kind: RoundKind, request: Request, result: list[int], error: Exception | None) -> None:
        """Emit the tokens of a round, and learn its acceptance rate."""
        accepted, token, *drafts = result
        last = request.position + accepted
        fault = request.fault(token, "the head", request.num_layers, last)
        # The draft after the accepted ones follows valid tokens; those after it do not, so they may be -1.
        for draft in drafts[accepted : accepted + 1]:
            fault = fault or request.fault(draft, "the draft head", kind.exit_layer or 0, last)
        num_drafts = drafts.index(NOT_DRAFTED) if NOT_DRAFTED in drafts else len(drafts)
        if request.options.adaptive:
            if request.lookup_drafts is None and kind.exit_layer is not None:
                request.acceptance.observe(kind.exit_layer, accepted, num_drafts)
            if request.lookup is not None:
                request.acceptance.observe_proposal(request.lookup.proposal, [*drafts[:accepted], token])
        exit_layer = kind.exit_layer if kind.speculative else request.exit_layer
        self._emit(request, lambda: request.emit_round(drafts[:num_drafts], accepted, token, exit_layer, fault), error)

    # Prefill

    def _prefill(self) -> None:
        """Prefill as much as a step may, and emit the first tokens."""
        free_slots = set(self._scheduler.free_slots)
        for request, error in self._scheduler.run_prefill():
            if error is None:
                self._start(request)
            else:
                self._emit(request, error=error)
        if not free_slots <= set(self._scheduler.free_slots):
            self._batches_valid = False  # batches may use a slot for padding that is no longer free

    def _start(self, request: Request) -> None:
        """Emit the token that follows the prompt."""
        token = 0
        error: Exception | None = None
        try:
            with torch.inference_mode():
                assert request.last_hidden is not None
                step = spec_step_of(self._model, self._cache, [request])
                token = int(step.first(request.last_hidden, sequences_of(self._model, [request])))
            error = step.failures.get(0)
        except Exception as raised:  # of this request: the others continue
            error = raised
        self._scheduler.start(request)
        self._batches_valid = False
        fault = request.fault(token, "the head", request.num_layers, request.position)
        self._emit(request, lambda: request.emit(token, fault), error)

    # Updates

    def _emit(self, request: Request, emit: Callable[[], None] | None = None, error: Exception | None = None) -> None:
        """Emit tokens unless there is an error; free the slot if the request has ended."""
        try:
            if error is None and emit is not None:
                emit()
        except Exception as raised:  # of the request's own rule, or a fault: the other requests continue
            error = raised
        if error is not None:
            request.reason = "error"
        if request.reason is not None:
            self._scheduler.free_slot(request, retain=request.keep and error is None)
            self._batches_valid = False
        self._report(request, error)

    def _report(self, request: Request, error: Exception | None = None) -> None:
        """Add new tokens to the update of a request, which an interrupted step may have begun."""
        new = slice(request.num_reported, None)
        output = None if request.reason is None else request.output()
        new_tokens, drafted = request.new_tokens[new], request.drafted[new]
        if (before := self._updates.get(request.id)) is not None:
            new_tokens, drafted = before.tokens + new_tokens, before.drafted + drafted
        self._updates[request.id] = Update(request.id, new_tokens, drafted, request.reason, output, error)
        request.num_reported = len(request.new_tokens)


def _choose(running: Iterable[Request], controller: Controller) -> bool:
    """Let the controller choose the next rounds, together for requests that leave the same open.

    Returns
    -------
    bool
        Whether the `RoundKind` of a request changed.
    """
    groups: dict[Hashable, list[Request]] = {}
    for request in running:
        options = request.options
        if options.adaptive:
            key = (options.exit_layer, options.num_speculations, options.uses_exit, request.lookup is not None)
            groups.setdefault(key, []).append(request)
    changed = False
    for requests in groups.values():
        options, acceptances = requests[0].options, [request.acceptance for request in requests]
        for request in requests:
            request.acceptance.lag = request.draft_lag
        exit_layer = None if options.exit_layer == "auto" else int(options.exit_layer)
        num_speculations = None if options.num_speculations == "auto" else int(options.num_speculations)
        proposals = [request.lookup.proposal for request in requests if request.lookup is not None]
        num_lookups: list[int | None] = [None] * len(requests)
        if proposals:
            choice, num_lookups = controller.choose_with_lookups(
                acceptances, proposals, exit_layer, num_speculations, options.uses_exit
            )
        else:
            choice = controller.choose(acceptances, exit_layer, num_speculations)
        for request, count in zip(requests, num_lookups, strict=True):
            before = request.kind
            if request.lookup is not None:
                request.lookup_drafts = None if count is None else list(request.lookup.proposal.tokens[:count])
            if choice.exit_layer is not None:
                request.exit_layer, request.num_speculations = choice
            changed = changed or request.kind != before
    return changed


def _by_kind(running: Iterable[Request]) -> dict[RoundKind, list[Request]]:
    """Group requests whose next rounds are the same. Requests with lookup drafts only join those of an exit."""
    kinds: dict[RoundKind, list[Request]] = {}
    for request in sorted(running, key=lambda one: one.kind.speculative and one.kind.exit_layer is None):
        kind = request.kind
        if kind.speculative and kind.exit_layer is None:
            others = (one for one in kinds if one.speculative and one.processed == kind.processed)
            kind = next(others, kind)
        kinds.setdefault(kind, []).append(request)
    return kinds
