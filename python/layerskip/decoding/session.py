"""Continuous batching: many requests, each with its own prompt, end and pace."""

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
from .outputs import Update
from .request import Clock, Defaults, Ending, Reading, Request, RoundKind, StopRule, TokenSequence
from .sampling import History, LogitsProcessor, SamplingParams, params_of, seed_of
from .scheduler import PromptLine, PromptReader, Slots, prompt_budget
from .spec_step import NOT_DRAFTED


def choose(running: Iterable[Request], controller: Controller) -> bool:
    """Let the controller pick for the requests that want it, together for those that leave the same open.

    Returns
    -------
    bool
        Whether the kind of a request's next round changed.
    """
    open_choices: dict[Hashable, list[Request]] = {}
    for request in running:
        method = request.method
        if method.adaptive:
            given = (method.exit_layer, method.num_speculations, method.exits, request.lookup is not None)
            open_choices.setdefault(given, []).append(request)
    changed = [_choose_together(requests, controller) for requests in open_choices.values()]
    return any(changed)


def _choose_together(requests: Sequence[Request], controller: Controller) -> bool:
    method, changed = requests[0].method, False
    acceptances = [request.acceptance for request in requests]
    for request in requests:
        request.acceptance.lag = request.behind
    given = (method.exit_layer, method.num_speculations)
    proposals = [request.lookup.proposal for request in requests if request.lookup is not None]
    counts: list[int | None] = [None] * len(requests)
    if proposals:
        choice, counts = controller.choose_with_lookups(acceptances, proposals, *given, exits=method.exits)
    else:
        choice = controller.choose(acceptances, *given)
    for request, count in zip(requests, counts, strict=True):
        if request.lookup is not None:
            request.looked_up = None if count is None else list(request.lookup.proposal.tokens[:count])
        if choice.exit_layer is not None and choice != (request.exit_layer, request.num_speculations):
            before = request.kind()
            request.exit_layer, request.num_speculations = choice.exit_layer, choice.num_speculations
            changed = changed or request.kind() != before
    return changed


def by_kind(running: Iterable[Request]) -> dict[RoundKind, list[Request]]:
    """The requests whose next round is the same. Drafts that are looked up go along where others speculate."""
    kinds: dict[RoundKind, list[Request]] = {}
    for request in sorted(running, key=lambda one: not one.kind().exit_layer):
        kind = request.kind()
        kinds.setdefault(kind if kind.exit_layer else _shared(kind, kinds), []).append(request)
    return kinds


def _shared(kind: RoundKind, others: Iterable[RoundKind]) -> RoundKind:
    """The kind of round for sequences whose drafts are looked up: one in which others speculate, if there is one."""
    return next((one for one in others if one.speculative and one.processed == kind.processed), kind)


def learn(kind: RoundKind, request: Request, emitted: list[int], num_drafted: int) -> None:
    """Note what was accepted, and what would have been of a proposal that was not drafted."""
    if not request.method.adaptive:
        return
    if request.looked_up is None:
        request.acceptance.observe(kind.exit_layer, len(emitted) - 1, num_drafted)
    if request.lookup is not None:
        request.acceptance.observe_proposal(request.lookup.proposal, emitted)


class Session:
    """Requests that share a cache, as `SelfSpeculativeDecoder.open_session` makes it.

    A request gets, bit for bit, the tokens that it would get alone. Each running request has a slot, which is a row of
    the cache. The others wait for one, first come first served. A prompt is read in pieces between the rounds of the
    others, and what of its beginning a slot already holds is copied, not read.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
        With room for the longest sequence and a round's drafts in every row.
    defaults : Defaults
    max_seq_len : int
        The longest prompt and continuation.
    max_speculations : int
        The most drafts of a round.
    generator : torch.Generator, optional
        Draws the seeds of requests that bring none; by default torch's own.
    clock : callable
        Gives the time, in seconds, for the controller and the statistics.
    graphs : Graphs, optional
        Records the rounds over ``cache`` and replays them; without it they are called.
    prompt_tokens_per_step : int, "auto" or None
        How many tokens of prompts a step reads while requests run, as `prompt_budget` takes it; by default all.
    max_waiting : int, optional
        How many requests may wait beyond those for which there are slots; by default any number.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        defaults: Defaults,
        max_seq_len: int,
        max_speculations: int,
        generator: torch.Generator | None = None,
        clock: Clock = time.perf_counter,
        graphs: Graphs | None = None,
        prompt_tokens_per_step: int | str | None = None,
        max_waiting: int | None = None,
    ) -> None:
        self._model, self._cache, self._defaults = model, cache, defaults
        self.max_seq_len, self.max_speculations = max_seq_len, max_speculations
        self._generator, self._clock, self._graphs = generator, clock, graphs
        self._ids = itertools.count()
        self._reader = PromptReader(model, cache)
        self._slots = Slots(cache, self._reader)
        self._budget = prompt_budget(prompt_tokens_per_step)
        self._line = PromptLine(self._slots, self._reader, self._budget, clock, max_waiting)
        self._running: dict[int, Request] = {}
        self._updates: dict[int, Update] = {}  # by request: what no `step` has returned yet
        self._batches: list[Batch] = []
        self._grouped = False  # whether they are those of the running requests as they are

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session can't be pickled or copied: it is requests in progress, on a cache")

    def __len__(self) -> int:
        """How many requests have not had their last update."""
        ended = sum(update.finished for update in self._updates.values())
        return len(self._line) + len(self._running) + ended

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
            With ``continue_from``, what follows that request's prompt and new tokens.
        max_new_tokens : int
        strategy : {"self_speculative", "autoregressive", "early_exit"}
            The first two give the same greedy tokens. The third decodes at layer E alone, with no verification.
        exit_layer, num_speculations : int or "auto", optional
            By default the decoder's. "auto": a `Controller` picks, round by round.
        draft_threshold : float, optional
            In [0, 1]; by default the decoder's. A greedy draft ends before the first token to which the exit gives a
            smaller probability; a draft that is drawn ends after it, which keeps the distribution.
        draft_source : {"exit", "ngram", "auto"} or DraftSource, optional
            Where drafts come from; by default the decoder's. "exit": layers [0, E). "ngram": text that occurred before,
            see `NgramSource`. "auto": a `Controller` picks the faster one, or none, round by round.
        sampling : SamplingParams, optional
            By default greedy.
        eos_token_id : int or sequence of int, optional
            By default the decoder's. An empty list: nothing ends the sequence.
        logits_processor : callable, optional
            ``(history [n], logits [V]) -> logits [V]``, for every drafted and verified position; ``history`` are all
            tokens before it, drafts included. It must not keep or change its arguments. It is applied after bias and
            repetition penalty and before the temperature.
        should_stop : callable, optional
            ``(new tokens so far) -> bool``, called for every token that is emitted. Neither hook may call the session.
        keep : bool
            Keep keys and values when the request has ended, unless in an error, for requests that begin with the same
            tokens, or continue it. They go with `release`, with a request that continues them, or when a request needs
            a slot and no other is free; then those go that were used least recently.
        continue_from : int, optional
            The id of a request that is kept. It is not kept any longer once this one is read.

        Returns
        -------
        int
            The request's id.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        SessionFullError
            If ``max_waiting`` requests wait.
        """
        model, defaults = self._model, self._defaults
        given = (strategy, exit_layer, num_speculations, draft_threshold, draft_source)
        method = defaults.method(*given, model, self.max_speculations)
        ids = validation.prompt(prompt, model.vocab_size, model.device)
        if continue_from is not None:
            ids = torch.cat([self._kept(continue_from).sequence.all_tokens, ids], 1)
        validation.at_least_one("max_new_tokens", max_new_tokens)
        validation.length(ids.shape[1], max_new_tokens, self.max_seq_len)
        params = params_of(sampling, model.vocab_size)
        stops = defaults.eos_token_id if eos_token_id is None else eos_token_id
        ending = Ending(max_new_tokens, validation.stop_tokens(stops, model.vocab_size), should_stop)
        self._line.check_room()
        model.refresh()  # weights may have been changed in place since the session was opened
        number, seed = next(self._ids), seed_of(params, self._generator)
        sequence, reading = TokenSequence(ids, ending, self._clock), Reading(ids, method.depth(model))
        acceptance = defaults.controller.new_acceptance()
        request = Request(
            number, method, params, seed, sequence, reading, logits_processor, acceptance, keep, continue_from
        )
        request.lookup = method.lookup(request.tokens, model.vocab_size)
        if logits_processor is not None:
            sequence.history = History(ids, max_new_tokens + self.max_speculations + 1)
            if self._graphs is not None:
                warn_unrecorded(logits_processor)
        self._line.add(request)
        return request.id

    def step(self) -> list[Update]:
        """Run one round of every running request, then read prompts of waiting requests into free slots.

        While requests run, ``prompt_tokens_per_step`` bounds what is read, but for the end of a pass. Recorded rounds
        run ahead: a step launches the next one before it waits for its own.

        If an exception (an interrupt, say) leaves a step, nothing is lost: the next step goes on from there, and
        returns the updates of this one, too.

        Returns
        -------
        list of Update
            At most one for each request.
        """
        started = self._clock()
        try:
            if self._graphs is not None:
                self._graphs.follow()
            for request in [one for one in self._running.values() if one.sequence.interrupted]:
                self._emit(request, request.sequence.resume)
            self._look_up()
            batches = self._current_batches()
            for batch in batches:
                self._take_round(batch, *batch.run())
            self._budget.begin_step(self._clock() - started if batches else None)
            if self._line:
                self._read_prompts()
        except BaseException:
            # Their tensors may be ahead of the requests' tokens. What was launched and not read is launched again.
            self._batches, self._grouped = [], False
            raise
        updates, self._updates = self._updates, {}
        return list(updates.values())

    def run(self) -> Iterator[Update]:
        """Step until all requests have ended; raise the error of a request that fails."""
        while len(self):
            for update in self.step():
                if update.error is not None:
                    raise update.error
                yield update

    def cancel(self, request_id: int) -> None:
        """End a request. The next step's update of it has the reason "cancelled" and the output so far."""
        request = self._take(request_id, keep=True)
        request.sequence.reason = "cancelled"
        self._report(request)

    def remove(self, request_id: int) -> None:
        """Drop a request at once, without an update."""
        pending = self._updates.get(request_id)  # of an interrupted step
        if pending is None or not pending.finished:
            self._take(request_id)
        self._updates.pop(request_id, None)

    def release(self, request_id: int) -> None:
        """Forget the keys and values of a request that was kept."""
        self._slots.release(self._kept(request_id).id)

    @property
    def kept(self) -> tuple[int, ...]:
        """The ids of the requests whose keys and values are kept, the least recently used first."""
        return tuple(self._slots.kept)

    def _kept(self, request_id: int) -> Request:
        if request_id not in self._slots.kept:
            raise ValueError(f"request {request_id!r} is not kept, these are: {list(self.kept)}")
        return self._slots.kept[request_id]

    def _take(self, request_id: int, keep: bool = False) -> Request:
        """Take a request out of its slot, or out of those that wait."""
        request = self._line.take(request_id)
        if request is None and request_id in self._running:
            request = self._running[request_id]
            self._leave_slot(request, keep and request.keep)
        if request is None:
            raise ValueError(f"request_id must be that of a request that has not ended, got {request_id!r}")
        return request

    def _leave_slot(self, request: Request, keep: bool = False) -> None:
        del self._running[request.id]
        self._slots.give_back(request, keep)
        self._grouped = False

    def _read_prompts(self) -> None:
        """Read prompts, as many tokens as a step may, and emit the tokens that follow them."""
        free = set(self._slots.free)
        for request, error in self._line.read(self._running.values()):
            if error is None:
                self._begin(request)
            else:
                self._line.fail(request)
                request.sequence.reason = "error"
                self._report(request, error)
        if not free <= set(self._slots.free):
            self._grouped = False  # batches may pad with a slot that is no longer free

    def _begin(self, request: Request) -> None:
        """Emit the token that follows a prompt."""
        position = request.sequence.position
        try:
            token, failures = self._first_token(request)
        except Exception as error:  # of this request: the others go on
            token, failures = 0, {0: error}
        self._line.leave(request)
        self._running[request.id] = request
        self._grouped = False
        fault = request.fault(token, "the head", self._last_layer(request), position)
        self._emit(request, lambda: request.sequence.add([], 0, token, fault), failures.get(0))

    @torch.inference_mode()
    def _first_token(self, request: Request) -> tuple[int, dict[int, Exception]]:
        """The token that follows a request's prompt, and what its logits processor raised."""
        state = request.reading.state
        assert state is not None
        step = spec_step_of(self._model, self._cache, [request])
        return int(step.first(state, sequences_of(self._model, [request]))), step.failures

    def _current_batches(self) -> list[Batch]:
        """The running requests by the kind of their next round."""
        if choose(self._running.values(), self._defaults.controller):
            self._grouped = False
        if not self._grouped:
            for batch in self._batches:
                self._finish(batch)
            self._batches = [
                Batch(self._model, self._cache, kind, requests, self._graphs, self._slots.free, self._clock)
                for kind, requests in by_kind(self._running.values()).items()
            ]
            self._grouped = True
        return self._batches

    def _look_up(self) -> None:
        """Ask the requests' sources for drafts; a source that fails ends its own request only."""
        for request in list(self._running.values()):
            try:
                request.look_up(self.max_speculations)
            except Exception as error:
                self._emit(request, lambda: None, error)

    def _finish(self, batch: Batch) -> None:
        """Take what a round gives that was launched before a request joined, left, or changed its kind.

        It is right for all that still run; one whose requests have all ended need not be waited for.
        """
        if batch.under_way and any(request.id in self._running for request in batch.requests):
            self._take_round(batch, *batch.read())

    def _take_round(self, batch: Batch, launched: Launched, results: Sequence[list[int]]) -> None:
        adaptive = any(request.method.adaptive for request in batch.requests)
        if adaptive and launched.exit_layer is not None and not launched.caught_up:
            choice = Choice(launched.exit_layer or None, launched.num_speculations)
            self._defaults.controller.observe_cost(choice, len(batch.requests), launched.outcome.seconds)
        failures = batch.failures
        for index, (request, result) in enumerate(zip(batch.requests, results, strict=True)):
            if request.id in self._running:
                self._take_result(batch.kind, request, result, failures.get(index))

    def _take_result(self, kind: RoundKind, request: Request, result: list[int], failure: Exception | None) -> None:
        """Emit what a round gave a request."""
        accepted, token, *drafts = result
        last = request.sequence.position + accepted
        fault = request.fault(token, "the head", self._last_layer(request), last)
        # The draft after the accepted ones was made from tokens that hold; those after it were not, so they may be -1.
        for draft in drafts[accepted : accepted + 1]:
            fault = fault or request.fault(draft, "the draft head", kind.exit_layer, last)
        num_drafted = drafts.index(NOT_DRAFTED) if NOT_DRAFTED in drafts else len(drafts)
        learn(kind, request, [*drafts[:accepted], token], num_drafted)
        no_exit = request.looked_up is not None or request.method.strategy == "autoregressive"
        source, exit_layer = request.source, None if no_exit else kind.exit_layer
        made = drafts[:num_drafted]
        self._emit(request, lambda: request.sequence.add(made, accepted, token, fault, source, exit_layer), failure)

    def _last_layer(self, request: Request) -> int:
        """The layer that a request's tokens come from: what was read after it are draft layers, which only draft."""
        return min(request.reading.depth, self._model.num_layers)

    def _emit(self, request: Request, emit: Callable[[], None], failure: Exception | None = None) -> None:
        """Let tokens be added to a request's sequence; end the request where they or an exception end it."""
        sequence, error = request.sequence, failure
        try:
            if error is None:
                emit()
        except Exception as raised:  # by the request's own rule, or for the fault: the other requests go on
            error = raised
        if error is not None:
            sequence.reason = "error"
        if sequence.reason is not None:
            self._leave_slot(request, request.keep and error is None)
        self._report(request, error)

    def _report(self, request: Request, error: Exception | None = None) -> None:
        """Make an update of what is new of a request, after what an interrupted step has left to tell."""
        sequence, new = request.sequence, slice(request.reported, None)
        output = None if sequence.reason is None else sequence.output()
        tokens, drafted = sequence.tokens[new], sequence.drafted[new]
        if (before := self._updates.get(request.id)) is not None:
            tokens, drafted = before.tokens + tokens, before.drafted + drafted
        self._updates[request.id] = Update(request.id, tokens, drafted, sequence.reason, output, error)
        request.reported = len(sequence.tokens)
