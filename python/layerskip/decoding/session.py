"""Continuous batching: requests with their own prompt, end and pace share a KV cache."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from .._autograd_modes import InferenceMode
from ..models import LayerSkipModel, SharedKVCache
from . import validation
from .adaptive import Choice, Controller
from .batch import Batch, Launched, sequences_of, spec_step_of
from .cuda_graphs import Graphs, warn_unrecorded
from .draft_sources import DraftSource
from .outputs import Streamer, Update
from .request import Clock, DraftKind, Prompt, Request, RequestDefaults, RoundKind, StopRule
from .sampling import History, LogitsProcessor, SamplingParams, params_of, seed_of
from .scheduler import Scheduler, prefill_budget
from .spec_step import NOT_DRAFTED

Result = TypeVar("Result")


class Session:
    """Requests that share a KV cache, see `SelfSpeculativeDecoder.open_session`.

    A request gets, bit for bit, the tokens that it would get alone. Every running request has a slot of the cache; the
    others wait, by priority, then first come first served. Prompts are prefilled in chunks between the rounds of
    running requests, and a prefix that is in the cache already is copied.

    An exception at any point of a call, Ctrl-C or a signal handler's, loses no request, slot, token or update, and the
    next step continues. This is because every change of state is a single assignment: a request enters ``waiting`` or
    ``slots``, a round's tokens enter the request, a token is appended, a request is marked as ended. Everything else is
    derived: running requests, free slots, updates to report. A round whose tokens a request does not have
    yet is computed again. It writes the same positions of the cache and draws with the noise of the same seed and
    positions, so it gives the same tokens. ``_due`` refers to what no call has returned. The assignment that empties it
    precedes the return directly, and Python handles signals at calls and loops only.

    ``cache`` has room for ``max_seq_len`` and ``max_speculations`` + 1 positions in every slot; ``graphs`` records the
    rounds over it; ``tokenizer`` encodes and decodes texts. The other parameters are those of
    `SelfSpeculativeDecoder.open_session`.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        defaults: RequestDefaults,
        controller: Controller,
        max_seq_len: int,
        max_speculations: int,
        generator: torch.Generator | None = None,
        clock: Clock = time.perf_counter,
        graphs: Graphs | None = None,
        prompt_tokens_per_step: int | str | None = None,
        max_waiting: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._model, self._cache, self._defaults, self._controller = model, cache, defaults, controller
        self.max_seq_len, self.max_speculations = max_seq_len, max_speculations
        self._generator, self._clock, self._graphs, self.tokenizer = generator, clock, graphs, tokenizer
        self._ids = itertools.count()
        self._scheduler = Scheduler(model, cache, prefill_budget(prompt_tokens_per_step), clock, max_waiting)
        self._due: dict[int, tuple[Request, int]] = {}  # requests to report; number of new tokens reported before
        self._batches: list[Batch] = []
        self._members: tuple[list[int], list[int]] = ([], [])  # running requests and free slots when they were made
        self._interrupted = False  # whether an exception has left the last step
        self._thread: threading.Thread | None = None  # that a call runs in

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session can't be pickled or copied: it is requests in progress, on a cache")

    def __len__(self) -> int:
        """Number of requests without their last update."""
        waiting, slots = self._scheduler.waiting, self._scheduler.slots
        ended = sum(one.reason not in (None, "removed") and one.id not in waiting for one, _ in self._due.values())
        return len(waiting) + sum(one is not None and one.reason is None for one in slots) + ended

    def add(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = 128,
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
        priority: int = 0,
        deadline: float | None = None,
    ) -> int:
        """Add a request, which waits until a slot is free.

        Parameters
        ----------
        prompt : str, Tensor [N] or [1, N], numpy array, BatchEncoding, or sequence of int
            With ``continue_from``, what follows that request's prompt and new tokens; a text then gets no special
            tokens.
        max_new_tokens : int, optional
            None decodes up to the session's ``max_seq_len``.
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
        priority : int
            Of waiting requests those with the highest priority get a slot first. Running requests keep theirs.
        deadline : float, optional
            Seconds after which the next step ends the request, waiting or running, with the reason "deadline" and the
            output so far.

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
        given = {
            "strategy": strategy, "exit_layer": exit_layer, "num_speculations": num_speculations,
            "draft_threshold": draft_threshold, "draft_source": draft_source, "eos_token_id": eos_token_id,
        }  # fmt: skip
        self._enter()
        try:
            model = self._model
            params = params_of(sampling, model.vocab_size)
            repeatable = params.seed is not None and not params.greedy
            options = self._defaults.updated(model, self.max_speculations, repeatable, **given)
            first = continue_from is None
            ids = validation.prompt(prompt, model.vocab_size, model.device, self.tokenizer, special_tokens=first)
            if continue_from is not None:
                ids = torch.cat([self._retained(continue_from).all_ids, ids], 1)
            length = validation.length(ids.shape[1], max_new_tokens, self.max_seq_len)
            max_new_tokens = length - ids.shape[1]
            stop_tokens = validation.stop_tokens(options.eos_token_id, model.vocab_size)
            validation.integer("priority", priority)
            if deadline is not None:
                validation.real("deadline", deadline, 0, math.inf, open_low=True)
            self._scheduler.check_room()
            model.refresh()  # weights may have been changed in place since the session was opened
            request = Request(
                next(self._ids), model, options, ids, max_new_tokens, params, seed_of(params, self._generator),
                self._controller.new_acceptance(), stop_tokens, should_stop, logits_processor, keep, continue_from,
                self._clock, self.tokenizer, priority, deadline,
            )  # fmt: skip
            if logits_processor is not None:
                request.history = History(ids, max_new_tokens + self.max_speculations + 1)
                if self._graphs is not None:
                    warn_unrecorded(logits_processor)
            self._scheduler.waiting[request.id] = request  # the last thing, so that a call that raises adds nothing
            return request.id
        finally:
            self._thread = None

    def step(self) -> list[Update]:
        """Run one round of every running request, then prefill waiting requests into free slots.

        While requests run, ``prompt_tokens_per_step`` limits the prefill. Recorded rounds run ahead: a step launches
        the next one before it waits for its own.

        Returns
        -------
        list of Update
            At most one for each request. If an exception leaves a step, the next one returns the updates of both.

        Raises
        ------
        RuntimeError
            If a call in another thread is not finished. It changes nothing, as in the other methods.
        """
        return self._exclusively(self._step)

    def _step(self) -> list[Update]:
        self._advance()
        updates = [_update(*due) for due in self._due.values()]
        self._due = {}  # no call or loop between this and the return: Python handles signals only there
        return updates

    def run(self, streamer: Streamer | None = None) -> Iterator[Update]:
        """Step until all requests have ended; raise the error of a request that fails. ``streamer`` gets new tokens.

        Updates that were not yielded, because of an error or because the loop was left, are kept for the next step.
        """
        while len(self):
            self._exclusively(self._advance)
            while self._due:
                request, reported = next(iter(self._due.values()))
                update = _update(request, reported)
                if update.error is None and streamer is not None:
                    streamer.put(torch.tensor(update.tokens))
                del self._due[request.id]
                if update.error is not None:
                    raise update.error
                yield update
        if streamer is not None:
            streamer.end()

    def cancel(self, request_id: int) -> None:
        """End a request. The next step's update of it has the reason "cancelled" and the output so far."""
        self._exclusively(lambda: self._end(self._scheduler.find(request_id), "cancelled"))

    def remove(self, request_id: int) -> None:
        """Drop a request at once, without an update."""
        self._exclusively(lambda: self._remove(request_id))

    def _remove(self, request_id: int) -> None:
        due = self._due.get(request_id)  # since an interrupted step
        if due is None or due[0].reason is None:
            self._end(self._scheduler.find(request_id), "removed")
        self._due.pop(request_id, None)

    def release(self, request_id: int) -> None:
        """Drop the keys and values of a retained request."""
        self._exclusively(lambda: setattr(self._retained(request_id), "keep", False))

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Ids of the requests without their last update."""
        ended = [one for one, _ in self._due.values() if one.reason not in (None, "removed")]
        return tuple({one.id: None for one in (*ended, *self._scheduler)})

    @property
    def kept(self) -> tuple[int, ...]:
        """Ids of the retained requests, the least recently used first."""
        return tuple(self._scheduler.retained)

    def _retained(self, request_id: int) -> Request:
        retained = self._scheduler.retained
        if request_id not in retained:
            raise ValueError(f"request {request_id!r} is not kept, these are: {list(retained)}")
        return retained[request_id]

    def _enter(self) -> None:
        """Begin a call, which sets ``_thread`` to None when it ends; refuse it while another thread's call runs."""
        caller, other = threading.current_thread(), self._thread
        if other is not None and other is not caller:
            raise RuntimeError(f"the session is in use by the thread {other.name!r}: one thread at a time may call it")
        self._thread = caller

    def _exclusively(self, call: Callable[[], Result]) -> Result:
        self._enter()
        try:
            return call()
        finally:
            self._thread = None

    # Rounds

    def _advance(self) -> None:
        """Run a round and prefill; ``_due`` has the requests to report."""
        started = self._clock()
        if self._graphs is not None:
            self._graphs.follow()
        if self._interrupted:
            # The tensors of batches may be ahead of the requests' tokens. Rounds that were not read are repeated.
            self._batches, self._members = [], ([], [])
            for request in self._scheduler.running:
                self._emit(request, request.emit_pending)
        if self._interrupted or self._due:
            self._scheduler.sweep()
        for request in [one for one in self._scheduler if one.overdue]:
            self._end(request, "deadline")
        self._interrupted = True
        self._look_up_drafts()
        batches = self._current_batches()
        for batch in batches:
            self._collect(batch, *batch.run())
        self._scheduler.budget.begin_step(self._clock() - started if batches else None)
        for request, error in self._scheduler.run_prefill():
            self._start(request, error)
        self._due = {key: due for key, due in self._due.items() if _has_news(*due)}  # an interrupt may leave others
        self._interrupted = False

    def _look_up_drafts(self) -> None:
        """Ask the requests' draft sources; a source that fails ends its own request only."""
        for request in self._scheduler.running:
            try:
                request.look_up(self.max_speculations)
            except Exception as error:
                self._end(request, error)

    def _current_batches(self) -> list[Batch]:
        """Return the running requests, grouped by the kind of their next round."""
        running, free_slots = self._scheduler.running, self._scheduler.free_slots
        # A batch may be padded with free slots, so it also ends when one of them is used.
        if _choose(running, self._controller) or self._members != ([one.id for one in running], free_slots):
            for batch in self._batches:  # collect what was launched before a request joined, left, or changed its kind
                if batch.under_way and any(request.running for request in batch.requests):
                    self._collect(batch, *batch.read())
            running, free_slots = self._scheduler.running, self._scheduler.free_slots
            self._batches = [
                Batch(self._model, self._cache, kind, requests, self._graphs, free_slots, self._clock)
                for kind, requests in _by_kind(running).items()
            ]
            self._members = [one.id for one in running], free_slots
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
            if request.running and index in failures:
                self._end(request, failures[index])
            elif request.running:
                self._collect_request(batch.kind, request, *result)

    def _collect_request(self, kind: RoundKind, request: Request, accepted: int, token: int, *drafts: int) -> None:
        """Emit the tokens of a round, and learn its acceptance rate."""
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
        self._emit(request, lambda: request.emit_round(drafts[:num_drafts], accepted, token, exit_layer, fault))

    def _start(self, request: Request, error: Exception | None) -> None:
        """Emit the token that follows the prompt, unless reading it has failed."""
        try:
            if error is not None:
                raise error
            with InferenceMode(True):
                assert request.last_hidden is not None
                step = spec_step_of(self._model, self._cache, [request])
                token = int(step.first(request.last_hidden, sequences_of(self._model, [request])))
            if step.failures:
                raise step.failures[0]
        except Exception as raised:  # of this request: the others continue
            self._end(request, raised)
        else:
            fault = request.fault(token, "the head", request.num_layers, request.position)
            self._emit(request, lambda: request.emit(token, fault))

    # Changes of state, each of a request that `_due` has before

    def _emit(self, request: Request, emit: Callable[[], None]) -> None:
        """Emit tokens; an exception of the request's own rule, or a fault, ends it, and the others continue."""
        self._scheduler.touch(request)
        self._due.setdefault(request.id, (request, len(request.new_tokens)))
        try:
            emit()
        except Exception as error:
            self._end(request, error)

    def _end(self, request: Request, reason: str | Exception) -> None:
        """End a request before its time."""
        self._due.setdefault(request.id, (request, len(request.new_tokens)))
        request.end(reason)
        self._scheduler.sweep()


def _has_news(request: Request, reported: int) -> bool:
    return request.reason != "removed" and (request.reason is not None or len(request.new_tokens) > reported)


def _update(request: Request, reported: int) -> Update:
    """Return the update of a request of which that many new tokens were in earlier ones."""
    output = None if request.reason is None else request.output()
    if output is not None:
        request.options.hint(output.stats)
    error = request.ended_by if isinstance(request.ended_by, Exception) else None
    return Update(request.id, request.new_tokens[reported:], request.drafted(reported), request.reason, output, error)


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
