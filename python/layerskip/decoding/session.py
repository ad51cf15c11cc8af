"""Many sequences at once, each with a prompt, an end and a speed of its own: continuous batching."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models import SharedKVCache
from . import validation
from .adaptive import Choice
from .graph import Graphs
from .group import Group, processed_round
from .history import History
from .output import GenerationOutput
from .prefill import prefill
from .processors import LogitsProcessor
from .request import Kind, Plan, Request
from .round import NOT_DRAFTED
from .rows import Rows
from .sampling import SamplingParams, params_of
from .transcript import Clock, Ending, StopRule, Transcript

if TYPE_CHECKING:
    from .decoder import SelfSpeculativeDecoder


@dataclass(frozen=True)
class Update:
    """What one step did to one request.

    Attributes
    ----------
    request_id : int
    tokens : list of int
        New tokens; none of them is ever taken back.
    drafted : list of bool
        Whether each of them was drafted by the early layers, or given by the full model itself.
    reason : {"eos", "stop", "length", "cancelled", "error"} or None
        Why the request ended: an EOS token, its ``should_stop``, ``max_new_tokens``, `Session.cancel`, an exception;
        None while it goes on.
    output : GenerationOutput or None
        All of it [1, N + new], once it ended. The session keeps nothing.
    error : Exception or None
        What a hook raised, or FloatingPointError for logits that are not finite. Other requests are not touched.
    """

    request_id: int
    tokens: list[int]
    drafted: list[bool]
    reason: str | None = None
    output: GenerationOutput | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last update."""
        return self.reason is not None


class Session:
    """Requests that share a cache, as `SelfSpeculativeDecoder.open_session` makes it.

    A request's tokens are, bit for bit, those of decoding it alone. More requests than slots wait, first come first
    served; one that ends leaves its slot to the next.

    Parameters
    ----------
    decoder : SelfSpeculativeDecoder
        Its model, draft head, exit layer, number of drafts and stop tokens are the requests' defaults.
    cache : SharedKVCache
        Has a slot for each request that runs, and room for a longest sequence and a round.
    max_seq_len : int
        The longest prompt and continuation.
    max_speculations : int
        The most drafts of a round.
    generator : torch.Generator, optional
        Draws the seeds of requests that bring none; by default torch's own.
    clock : callable
        What the controller and the statistics take the time from, in seconds.
    graphs : Graphs, optional
        Records the rounds over ``cache`` and replays them; without, they are called.
    """

    def __init__(
        self,
        decoder: SelfSpeculativeDecoder,
        cache: SharedKVCache,
        max_seq_len: int,
        max_speculations: int,
        generator: torch.Generator | None = None,
        clock: Clock = time.perf_counter,
        graphs: Graphs | None = None,
    ) -> None:
        self._decoder, self._model, self._cache = decoder, decoder.model, cache
        self.max_seq_len, self.max_speculations = max_seq_len, max_speculations
        self._generator, self._clock, self._graphs = generator, clock, graphs
        self._ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._updates: list[Update] = []  # for the next list that `step` gives
        self._free = list(range(cache.batch_size))[::-1]
        self._groups: list[Group] | None = None

    def __len__(self) -> int:
        """Requests that have not had their last update."""
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
        draft_threshold: float = 0.0,
        sampling: SamplingParams | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: LogitsProcessor | None = None,
        should_stop: StopRule | None = None,
    ) -> int:
        """Put a request in line.

        Parameters
        ----------
        prompt : Tensor [N] or [1, N], or sequence of int
        max_new_tokens : int
        strategy : {"self_speculative", "autoregressive", "early_exit"}
            The first two give the same greedy tokens. The third decodes at layer E alone, with no verification.
        exit_layer, num_speculations : int or "auto", optional
            Instead of the decoder's own. "auto": a `Controller` picks, round by round.
        draft_threshold : float
            In [0, 1]. A greedy draft ends before a token that the exit gives less than this; one that is drawn ends
            after it, which keeps the distribution.
        sampling : SamplingParams, optional
            By default greedy.
        eos_token_id : int or sequence of int, optional
            By default the decoder's. An empty list: nothing ends the sequence.
        logits_processor : callable, optional
            ``(history [n], logits [V]) -> logits [V]``, for every drafted and verified position; ``history`` is all
            that comes before it, drafts included. It must not keep or change either. It comes after bias and
            repetition penalty and before the temperature.
        should_stop : callable, optional
            ``(new tokens so far) -> bool``, once for every token that is emitted. Neither hook may call the session.

        Returns
        -------
        int
            The request's id.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        """
        model = self._model
        plan = self._plan(strategy, exit_layer, num_speculations, draft_threshold)
        ids = validation.prompt(prompt, model.vocab_size, model.device)
        validation.at_least_one("max_new_tokens", max_new_tokens)
        validation.length(ids.shape[1], max_new_tokens, self.max_seq_len)
        params = params_of(sampling, model.vocab_size)
        stops = self._decoder.eos_token_id if eos_token_id is None else eos_token_id
        ending = Ending(max_new_tokens, validation.stop_tokens(stops, model.vocab_size), should_stop)
        request = Request(
            next(self._ids),
            ids,
            plan,
            params,
            self._seed(params),
            Transcript(ids, ending, self._clock),
            logits_processor,
            self._decoder.controller.new_acceptance(),
            plan.exit_layer or 0,
            plan.num_speculations or 0,
        )
        if request.processed:
            request.history = History(ids, max_new_tokens + self.max_speculations + 1)
        self._waiting.append(request)
        return request.id

    def step(self) -> list[Update]:
        """One round of every running request, and, where slots are free, the prompts of waiting ones.

        An exception that leaves a step (an interrupt, say) loses nothing: the next step goes on from there, and brings
        the updates of this one, too.

        Returns
        -------
        list of Update
            At most one a request.
        """
        try:
            for group in self._grouped():
                self._round(group)
            while self._free and self._waiting:
                self._admit(self._waiting[0])
        except BaseException:
            self._groups = None  # their tensors may be ahead of what was written down
            raise
        updates, self._updates = self._updates, []
        return updates

    def cancel(self, request_id: int) -> None:
        """End a request; the next step's update of it has the reason "cancelled" and what there is of its output."""
        request = self._take(request_id)
        request.transcript.reason = "cancelled"
        self._update(request)

    def remove(self, request_id: int) -> None:
        """Forget a request at once, with no update."""
        self._take(request_id)

    def _take(self, request_id: int) -> Request:
        """Take a request out of the line or its slot."""
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
        self._free.append(request.slot)
        self._groups = None

    def _plan(
        self, strategy: str, exit_layer: int | str | None, num_speculations: int | str | None, draft_threshold: float
    ) -> Plan:
        decoder = self._decoder
        exit_layer = decoder.exit_layer if exit_layer is None else exit_layer
        count = decoder.num_speculations if num_speculations is None else num_speculations
        plan = Plan(
            validation.strategy(strategy),
            validation.exit_layer_or_auto(exit_layer, self._model.num_layers),
            validation.count_or_auto("num_speculations", count, self.max_speculations),
            validation.real("draft_threshold", draft_threshold, 0.0, 1.0),
        )
        if strategy == "early_exit" and plan.exit_layer is None:
            raise ValueError(f"exit_layer must be an int for the strategy early_exit, got {exit_layer!r}")
        return plan if strategy == "self_speculative" else replace(plan, draft_threshold=0.0)

    def _seed(self, params: SamplingParams) -> int:
        if params.greedy:
            return 0
        if params.seed is not None:
            return params.seed
        device = torch.device("cpu") if self._generator is None else self._generator.device
        return int(torch.randint(2**63 - 1, (), generator=self._generator, device=device))

    def _admit(self, request: Request) -> None:
        """Read a prompt into a free slot; its first token."""
        request.slot = self._free[-1]
        try:
            token, failures = self._read_prompt(request)
        except Exception as error:  # of this prompt: the other requests go on
            self._waiting.popleft()
            request.transcript.reason = "error"
            self._update(request, error)
            return
        self._running[self._waiting.popleft().id] = request  # not before: reading may have failed
        self._free.pop()
        self._groups = None
        fault = _fault(request, token, "the head", self._depth(request), request.prompt.shape[1] - 1)
        self._emit(request, [], token, 0, fault, failures.get(0))

    @torch.inference_mode()
    def _read_prompt(self, request: Request) -> tuple[int, dict[int, Exception]]:
        state = prefill(self._model, self._cache, request.slot, request.prompt, self._depth(request))
        rows = Rows.of(
            [0], [request.prompt.shape[1] - 1], [request.slot], [request.seed], [request.sampling.temperature],
            self._model.device,
        )  # fmt: skip
        if request.processed:
            processed = processed_round(self._model, self._cache, [request])
            return int(processed.first(state, rows)), processed.failures
        noise = (None, None, None) if rows.noise is None else (*rows.noise, rows.seq_lens)
        return int(self._model.head(state, *noise).token), {}

    def _depth(self, request: Request) -> int:
        return request.exit_layer if request.plan.strategy == "early_exit" else self._model.num_layers

    def _grouped(self) -> list[Group]:
        """The running requests by kind of round."""
        self._choose()
        if self._groups is None:
            kinds: dict[Kind, list[Request]] = {}
            for request in self._running.values():
                kinds.setdefault(request.kind(self._model.num_layers), []).append(request)
            self._groups = [
                Group(self._model, self._cache, kind, requests, self._graphs, self._free)
                for kind, requests in kinds.items()
            ]
        return self._groups

    def _choose(self) -> None:
        """Let the controller pick for the requests that leave it to it, together where they leave it the same."""
        plans: dict[tuple[int | None, int | None], list[Request]] = {}
        for request in self._running.values():
            if request.plan.adaptive:
                plans.setdefault((request.plan.exit_layer, request.plan.num_speculations), []).append(request)
        for given, requests in plans.items():
            choice = self._decoder.controller.choose([request.acceptance for request in requests], *given)
            for request in requests:
                if choice != (request.exit_layer, request.num_speculations):
                    request.exit_layer, request.num_speculations = choice
                    self._groups = None

    def _round(self, group: Group) -> None:
        started, steps = self._clock(), group.steps
        results = group.run(steps, self._decoder.draft_head)
        if any(request.plan.adaptive for request in group.requests) and not group.recorded:
            choice = Choice(group.kind.depth, steps)
            self._decoder.controller.observe_cost(choice, len(group.requests), self._clock() - started)
        failures = group.failures
        for index, (request, result) in enumerate(zip(group.requests, results, strict=True)):
            self._read(group.kind, request, result, failures.get(index))

    def _read(self, kind: Kind, request: Request, result: list[int], failure: Exception | None) -> None:
        """Emit what a round gave."""
        accepted, token, *drafts = result
        last = request.transcript.position + accepted
        fault = _fault(request, token, "the head", self._depth(request), last)
        # The draft after the accepted ones came from the right context, the ones after it did not.
        for draft in drafts[accepted : accepted + 1]:
            fault = fault or _fault(request, draft, "the draft head", kind.depth, last)
        drafted = drafts.index(NOT_DRAFTED) if NOT_DRAFTED in drafts else len(drafts)
        if request.plan.adaptive:
            request.acceptance.observe(kind.depth, accepted, drafted)
        self._emit(request, drafts[:accepted], token, drafted, fault, failure)

    def _emit(
        self,
        request: Request,
        drafts: list[int],
        token: int,
        drafted: int,
        fault: str | None,
        failure: Exception | None,
    ) -> None:
        """Write down what a request is given; end it where it ends."""
        transcript, before = request.transcript, len(request.transcript.tokens)
        error = failure
        try:
            if error is None:
                transcript.add(drafts, token, drafted, fault)
        except Exception as raised:  # of the request's own rule, or the fault: the other requests go on
            error = raised
        finally:
            if request.history is not None:
                request.history.append(transcript.tokens[before:])
        if error is not None:
            transcript.reason = "error"
        if transcript.reason is not None:
            self._release(request)
        self._update(request, error)

    def _update(self, request: Request, error: Exception | None = None) -> None:
        """Report what is new of a request."""
        transcript, new = request.transcript, slice(request.reported, None)
        output = None if transcript.reason is None else transcript.close()
        tokens, drafted = transcript.tokens[new], transcript.drafted[new]
        self._updates.append(Update(request.id, tokens, drafted, transcript.reason, output, error))
        request.reported = len(transcript.tokens)


def _fault(request: Request, token: int, what: str, layer: int, position: int) -> str | None:
    """A head says -1 where its logits are not finite: that is an error, never a token."""
    if token != -1:
        return None
    causes = "the weights or the states hold NaN or infinity"
    if request.processed:
        causes += ", or bias and processors forbid every token"
    return f"{what} after layer {layer} gave logits that are not finite at position {position}; {causes}"
