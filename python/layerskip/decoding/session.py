"""Many sequences at once, each with its own prompt, end and pace: continuous batching."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from . import validation
from .batch import Batch, round_of
from .controller import Choice, Controller
from .graph import Graphs
from .logits import LogitsProcessor
from .output import Update
from .request import Method, Request, RoundKind
from .round import NOT_DRAFTED, SequenceTensors, read_prompt
from .sampling import SamplingParams, params_of
from .sequence import Clock, Ending, History, StopRule, TokenSequence


@dataclass(frozen=True)
class Defaults:
    """How a session decodes requests that do not say otherwise.

    Attributes
    ----------
    exit_layer, num_speculations : int or "auto"
    draft_threshold : float
    eos_token_id : int, sequence of int or None
        What ends a sequence.
    draft_head : EarlyExitHead
        What chooses the drafts of all requests.
    controller : Controller
        What picks in the place of "auto".
    """

    exit_layer: int | str
    num_speculations: int | str
    draft_threshold: float
    eos_token_id: int | Sequence[int] | None
    draft_head: EarlyExitHead
    controller: Controller


class Session:
    """Requests that share a cache, as `SelfSpeculativeDecoder.open_session` makes it.

    A request gets, bit for bit, the tokens that it would get alone. Each running request has a slot, which is a row of
    the cache. The others wait for one, first come first served.

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
    ) -> None:
        self._model, self._cache, self._defaults = model, cache, defaults
        self.max_seq_len, self.max_speculations = max_seq_len, max_speculations
        self._generator, self._clock, self._graphs = generator, clock, graphs
        self._ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._updates: list[Update] = []  # that no `step` has returned yet
        self._free_slots = list(range(cache.batch_size))[::-1]
        self._batches: list[Batch] | None = None  # of the running requests, until one of them changes

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session can't be pickled or copied: it is requests in progress, on a cache")

    def __len__(self) -> int:
        """How many requests have not had their last update."""
        ended = sum(update.finished for update in self._updates)
        return len(self._waiting) + len(self._running) + ended

    def add(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int = 128,
        *,
        strategy: str = "self_speculative",
        exit_layer: int | str | None = None,
        num_speculations: int | str | None = None,
        draft_threshold: float | None = None,
        sampling: SamplingParams | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: LogitsProcessor | None = None,
        should_stop: StopRule | None = None,
    ) -> int:
        """Add a request, which waits until a slot is free.

        Parameters
        ----------
        prompt : Tensor [N] or [1, N], or sequence of int
        max_new_tokens : int
        strategy : {"self_speculative", "autoregressive", "early_exit"}
            The first two give the same greedy tokens. The third decodes at layer E alone, with no verification.
        exit_layer, num_speculations : int or "auto", optional
            By default the decoder's. "auto": a `Controller` picks, round by round.
        draft_threshold : float, optional
            In [0, 1]; by default the decoder's. A greedy draft ends before the first token to which the exit gives a
            smaller probability; a draft that is drawn ends after it, which keeps the distribution.
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

        Returns
        -------
        int
            The request's id.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        """
        model, defaults = self._model, self._defaults
        method = self._method(strategy, exit_layer, num_speculations, draft_threshold)
        ids = validation.prompt(prompt, model.vocab_size, model.device)
        validation.at_least_one("max_new_tokens", max_new_tokens)
        validation.length(ids.shape[1], max_new_tokens, self.max_seq_len)
        params = params_of(sampling, model.vocab_size)
        stops = defaults.eos_token_id if eos_token_id is None else eos_token_id
        ending = Ending(max_new_tokens, validation.stop_tokens(stops, model.vocab_size), should_stop)
        request = Request(
            next(self._ids),
            method,
            params,
            self._seed(params),
            TokenSequence(ids, ending, self._clock),
            logits_processor,
            defaults.controller.new_acceptance(),
            method.exit_layer or 0,
            method.num_speculations or 0,
        )
        if request.processed:
            request.sequence.history = History(ids, max_new_tokens + self.max_speculations + 1)
        self._waiting.append(request)
        return request.id

    def _method(
        self,
        strategy: str,
        exit_layer: int | str | None,
        num_speculations: int | str | None,
        draft_threshold: float | None,
    ) -> Method:
        defaults = self._defaults
        exit_layer = defaults.exit_layer if exit_layer is None else exit_layer
        num_speculations = defaults.num_speculations if num_speculations is None else num_speculations
        draft_threshold = defaults.draft_threshold if draft_threshold is None else draft_threshold
        method = Method(
            validation.strategy(strategy),
            validation.exit_layer_or_auto(exit_layer, self._model.num_layers),
            validation.num_speculations_or_auto(num_speculations, self.max_speculations),
            validation.real("draft_threshold", draft_threshold, 0.0, 1.0),
        )
        if strategy == "early_exit" and method.exit_layer is None:
            raise ValueError(f"exit_layer must be an int for the strategy early_exit, got {exit_layer!r}")
        return method if strategy == "self_speculative" else replace(method, draft_threshold=0.0)

    def _seed(self, params: SamplingParams) -> int:
        if params.greedy:
            return 0
        if params.seed is not None:
            return params.seed
        device = torch.device("cpu") if self._generator is None else self._generator.device
        return int(torch.randint(2**63 - 1, (), generator=self._generator, device=device))

    def step(self) -> list[Update]:
        """Run one round of every running request, then read the prompts of waiting requests into free slots.

        If an exception (an interrupt, say) leaves a step, nothing is lost: the next step goes on from there, and
        returns the updates of this one, too.

        Returns
        -------
        list of Update
            At most one for each request.
        """
        try:
            for batch in self._current_batches():
                self._run_round(batch)
            while self._free_slots and self._waiting:
                self._admit(self._waiting[0])
        except BaseException:
            self._batches = None  # their tensors may be ahead of the requests' tokens
            raise
        updates, self._updates = self._updates, []
        return updates

    def cancel(self, request_id: int) -> None:
        """End a request. The next step's update of it has the reason "cancelled" and the output so far."""
        request = self._take(request_id)
        request.sequence.reason = "cancelled"
        self._report(request)

    def remove(self, request_id: int) -> None:
        """Drop a request at once, without an update."""
        self._take(request_id)

    def _take(self, request_id: int) -> Request:
        """Take a request out of its slot, or out of those that wait."""
        running = self._running.get(request_id)
        if running is not None:
            self._release(running)
            return running
        for request in self._waiting:
            if request.id == request_id:
                self._waiting.remove(request)
                return request
        raise ValueError(f"request_id must be that of a request that has not ended, got {request_id!r}")

    def _release(self, request: Request) -> None:
        del self._running[request.id]
        self._free_slots.append(request.slot)
        self._batches = None

    def _admit(self, request: Request) -> None:
        """Read a prompt into a free slot, and emit the token that follows it."""
        request.slot = self._free_slots[-1]
        try:
            token, failures = self._read_prompt(request)
        except Exception as error:  # of this request: the others go on
            self._waiting.popleft()
            request.sequence.reason = "error"
            self._report(request, error)
            return
        self._running[self._waiting.popleft().id] = request  # not before: reading may have failed
        self._free_slots.pop()
        self._batches = None
        layer, position = request.last_layer(self._model.num_layers), request.sequence.prompt.shape[1] - 1
        self._emit(request, [], token, 0, _fault(request, token, "the head", layer, position), failures.get(0))

    @torch.inference_mode()
    def _read_prompt(self, request: Request) -> tuple[int, dict[int, Exception]]:
        """The token that follows a request's prompt, and what its logits processor raised."""
        model, prompt = self._model, request.sequence.prompt
        hidden = read_prompt(model, self._cache, request.slot, prompt, request.last_layer(model.num_layers))
        round_ = round_of(model, self._cache, self._defaults.draft_head, [request])
        temperature, position = request.sampling.temperature, prompt.shape[1] - 1
        sequences = SequenceTensors.of([0], [position], [request.slot], [request.seed], [temperature], model.device)
        return int(round_.first(hidden, sequences)), round_.failures

    def _current_batches(self) -> list[Batch]:
        """The running requests by the kind of their next round."""
        self._choose()
        if self._batches is None:
            kinds: dict[RoundKind, list[Request]] = {}
            for request in self._running.values():
                kinds.setdefault(request.kind(self._model.num_layers), []).append(request)
            shared = (self._model, self._cache, self._defaults.draft_head)
            self._batches = [
                Batch(*shared, kind, requests, self._graphs, self._free_slots) for kind, requests in kinds.items()
            ]
        return self._batches

    def _choose(self) -> None:
        """Let the controller pick for the requests that want it, together for those that leave the same open."""
        open_choices: dict[tuple[int | None, int | None], list[Request]] = {}
        for request in self._running.values():
            if request.method.adaptive:
                given = (request.method.exit_layer, request.method.num_speculations)
                open_choices.setdefault(given, []).append(request)
        for given, requests in open_choices.items():
            choice = self._defaults.controller.choose([request.acceptance for request in requests], *given)
            for request in requests:
                if choice != (request.exit_layer, request.num_speculations):
                    request.exit_layer, request.num_speculations = choice
                    self._batches = None

    def _run_round(self, batch: Batch) -> None:
        started, num_speculations = self._clock(), batch.num_speculations
        results = batch.run(num_speculations)
        if any(request.method.adaptive for request in batch.requests) and not batch.recorded:
            choice = Choice(batch.kind.exit_layer, num_speculations)
            self._defaults.controller.observe_cost(choice, len(batch.requests), self._clock() - started)
        failures = batch.failures
        for index, (request, result) in enumerate(zip(batch.requests, results, strict=True)):
            self._take_result(batch.kind, request, result, failures.get(index))

    def _take_result(self, kind: RoundKind, request: Request, result: list[int], failure: Exception | None) -> None:
        """Emit what a round gave a request."""
        accepted, token, *drafts = result
        last = request.sequence.position + accepted
        fault = _fault(request, token, "the head", request.last_layer(self._model.num_layers), last)
        # The draft after the accepted ones was made from tokens that hold; those after it were not, so they may be -1.
        for draft in drafts[accepted : accepted + 1]:
            fault = fault or _fault(request, draft, "the draft head", kind.exit_layer, last)
        num_drafted = drafts.index(NOT_DRAFTED) if NOT_DRAFTED in drafts else len(drafts)
        if request.method.adaptive:
            request.acceptance.observe(kind.exit_layer, accepted, num_drafted)
        self._emit(request, drafts[:accepted], token, num_drafted, fault, failure)

    def _emit(
        self,
        request: Request,
        accepted: list[int],
        token: int,
        num_drafted: int,
        fault: str | None,
        failure: Exception | None,
    ) -> None:
        """Add tokens to a request's sequence; end the request where they or an exception end it."""
        sequence, error = request.sequence, failure
        try:
            if error is None:
                sequence.add(accepted, token, num_drafted, fault)
        except Exception as raised:  # by the request's own rule, or for the fault: the other requests go on
            error = raised
        if error is not None:
            sequence.reason = "error"
        if sequence.reason is not None:
            self._release(request)
        self._report(request, error)

    def _report(self, request: Request, error: Exception | None = None) -> None:
        """Make an update of what is new of a request."""
        sequence, new = request.sequence, slice(request.reported, None)
        output = None if sequence.reason is None else sequence.output()
        tokens, drafted = sequence.tokens[new], sequence.drafted[new]
        self._updates.append(Update(request.id, tokens, drafted, sequence.reason, output, error))
        request.reported = len(sequence.tokens)


def _fault(request: Request, token: int, what: str, layer: int, position: int) -> str | None:
    """The message for a token of -1, by which a head says that its logits are not finite; else None."""
    if token != -1:
        return None
    causes = "the weights or the states hold NaN or infinity"
    if request.processed:
        causes += ", or bias and processors forbid every token"
    return f"{what} after layer {layer} gave logits that are not finite at position {position}; {causes}"
