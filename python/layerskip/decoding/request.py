"""A request of a session: its parameters, its tokens and its progress."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import to_device
from ..models import LayerSkipModel
from . import validation
from .adaptive import AcceptanceRates, Controller
from .draft_sources import AUTO, EXIT, DraftSource, Lookup, NgramSource, source_of
from .outputs import GenerationOutput, RoundRecord, Stats
from .sampling import History, LogitsProcessor, SamplingParams


@dataclass(eq=False)
class Reading:
    """A prompt, and how much of it the cache holds.

    Attributes
    ----------
    prompt : Tensor [1, N], int64
    depth : int
        It is read with layers [0, depth), of which those from L on are the exit's draft layers.
    slot : int
        The row of the cache.
    done : int
        The first ``done`` tokens are in the cache.
    state : Tensor [1, D] or None
        That of the prompt's last token after these layers, once it is read.
    """

    prompt: Tensor
    depth: int
    slot: int = -1
    done: int = 0
    state: Tensor | None = None

    @property
    def left(self) -> int:
        """How many tokens are still to be read."""
        return self.prompt.shape[1] - self.done


StopRule = Callable[[list[int]], bool]
"""(the new tokens so far) -> whether the sequence ends with the last of them."""

Clock = Callable[[], float]
"""() -> seconds."""


@dataclass(frozen=True)
class Ending:
    """What ends a sequence: a number of tokens, one of some tokens, or a rule. The sequence includes its last token."""

    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    should_stop: StopRule | None = None


class _Begun(NamedTuple):
    """A round: the number of tokens before it, and what `RoundRecord` says of its drafts."""

    start: int
    source: str
    exit_layer: int | None
    drafts: tuple[int, ...]


class TokenSequence:
    """A prompt and what was emitted after it.

    Parameters
    ----------
    prompt : Tensor [1, N], int64
    ending : Ending
    clock : callable
        Gives the time for the statistics.

    Attributes
    ----------
    tokens : list of int
        The new tokens.
    drafted : list of bool
        Whether each of them was a draft.
    reason : str or None
        Why the sequence ended; None while it goes on.
    history : History or None
        The tokens on the device, where logits processors need them; emitted tokens are added to it.
    reused : int
        How many tokens of the prompt were in the cache before.
    """

    def __init__(self, prompt: Tensor, ending: Ending, clock: Clock = time.perf_counter) -> None:
        self.prompt, self._ending, self._clock = prompt, ending, clock
        self.tokens: list[int] = []
        self.drafted: list[bool] = []
        self.reason: str | None = None
        self.history: History | None = None
        self.reused = 0
        self._rest: deque[tuple[int, bool]] = deque()  # tokens of a round not emitted yet; whether they were drafts
        self._fault: str | None = None
        self._rounds: list[_Begun] = []
        self._started = clock()
        self._first_token_at = self._started

    @property
    def remaining(self) -> int:
        """How many tokens may still be emitted."""
        return self._ending.max_new_tokens - len(self.tokens)

    @property
    def position(self) -> int:
        """The position of the last token. The cache holds all positions before it."""
        return self.prompt.shape[1] + len(self.tokens) - 1

    @property
    def all_tokens(self) -> Tensor:
        """Prompt and new tokens, [1, N + new]."""
        return torch.cat([self.prompt, self._new_tokens], 1)

    @property
    def _new_tokens(self) -> Tensor:
        return to_device(torch.tensor([self.tokens], dtype=torch.int64), self.prompt.device)

    def add(
        self, drafts: Sequence[int], accepted: int, token: int, fault: str | None = None, source: str = EXIT,
        exit_layer: int | None = None,
    ) -> None:  # fmt: skip
        """Emit the accepted drafts of a round, then the full model's own ``token``, up to the sequence's end.

        The first call emits the token that follows the prompt, which is not counted as a round.

        Parameters
        ----------
        drafts : sequence of int
            What the round drafted.
        accepted : int
            How many of them were accepted.
        token : int
        fault : str, optional
            What is wrong with ``token``.
        source, exit_layer
            What drafted, as `RoundRecord` has it.

        Raises
        ------
        FloatingPointError
            With ``fault``, unless the sequence ends before ``token``.
        """
        if self.tokens:  # other sequences of the batch may need more drafts than this one
            begun = _Begun(len(self.tokens), source, exit_layer, tuple(drafts[: self.remaining]))
            self._rounds.append(begun)
        self._fault = fault
        self._rest = deque([*((draft, True) for draft in drafts[:accepted]), (token, False)])
        self.resume()

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt kept tokens of the last round from being emitted."""
        return bool(self._rest)

    def resume(self) -> None:
        """Emit what is left of a round; raises as `add` does."""
        before = len(self.tokens)
        try:
            self._emit_rest()
        finally:
            if self.history is not None:
                self.history.append(self.tokens[before:])
            if not self._rounds:
                self._first_token_at = self._clock()

    def _emit_rest(self) -> None:
        while self._rest:
            token, drafted = self._rest[0]
            if not drafted and self._fault is not None:
                raise FloatingPointError(self._fault)
            self._emit(token, drafted)
            self._rest.popleft()
            if self.reason is not None:
                self._rest.clear()

    def _emit(self, token: int, drafted: bool) -> None:
        rule, ends = self._ending.should_stop, token in self._ending.eos
        # Asked before the token counts: where an interrupt leaves the rule without an answer, it is asked again.
        stops = not ends and rule is not None and rule([*self.tokens, token])
        self.tokens.append(token)
        self.drafted.append(drafted)
        if ends:
            self.reason = "eos"
        elif stops:
            self.reason = "stop"
        elif self.remaining == 0:
            self.reason = "length"

    def output(self) -> GenerationOutput:
        """The tokens and statistics so far."""
        stats = Stats(
            prompt_tokens=self.prompt.shape[1],
            new_tokens=len(self.tokens),
            records=self._records(),
            seconds=self._clock() - self._started,
            time_to_first_token=self._first_token_at - self._started,
            reused=self.reused,
        )
        drafted = torch.tensor([self.drafted], dtype=torch.bool)
        return GenerationOutput(self.all_tokens, self._new_tokens, drafted, (stats,), (self.reason or "",))

    def _records(self) -> tuple[RoundRecord, ...]:
        """What each round did; one that was left in its middle, what it had emitted."""
        ends = [one.start for one in self._rounds[1:]] + [len(self.tokens)]
        return tuple(
            RoundRecord(one.source, one.exit_layer, one.drafts, sum(self.drafted[one.start : end]), end - one.start)
            for one, end in zip(self._rounds, ends, strict=False)  # where there is no round there is an end
        )


@dataclass(frozen=True)
class Method:
    """How a request is decoded. The controller picks an ``exit_layer`` or ``num_speculations`` that is None."""

    strategy: str
    exit_layer: int | None
    num_speculations: int | None
    draft_threshold: float = 0.0
    draft_source: str | DraftSource = EXIT

    @property
    def adaptive(self) -> bool:
        """Whether the controller has anything to pick."""
        if self.strategy != "self_speculative" or self.draft_source == AUTO:
            return self.strategy == "self_speculative"
        return self.num_speculations is None or (self.exits and self.exit_layer is None)

    @property
    def exits(self) -> bool:
        """Whether an exit may draft."""
        return self.draft_source in (EXIT, AUTO)

    def lookup(self, prompt: list[int], vocab_size: int) -> Lookup | None:
        """What looks up the drafts of a new sequence, if its source does."""
        if self.strategy != "self_speculative" or self.draft_source == EXIT:
            return None
        source = self.draft_source if isinstance(self.draft_source, DraftSource) else NgramSource()
        return Lookup(source.new(), prompt, vocab_size)

    def depth(self, model: LayerSkipModel) -> int:
        """Prompts are read with layers [0, depth): those that emitted tokens come from, and the exit's draft layers."""
        if self.strategy == "early_exit" and self.exit_layer is not None:
            return self.exit_layer
        drafts = self.strategy == "self_speculative" and self.exits
        return model.num_layers + (model.decoder.num_draft_layers if drafts else 0)


@dataclass(frozen=True)
class Defaults:
    """How a session decodes requests that do not say otherwise.

    Attributes
    ----------
    exit_layer, num_speculations : int or "auto"
    draft_threshold : float
    eos_token_id : int, sequence of int or None
        What ends a sequence.
    controller : Controller
        What picks in the place of "auto".
    draft_source : str or DraftSource
        Where drafts come from.
    """

    exit_layer: int | str
    num_speculations: int | str
    draft_threshold: float
    eos_token_id: int | Sequence[int] | None
    controller: Controller
    draft_source: str | DraftSource = EXIT

    def method(
        self,
        strategy: str,
        exit_layer: int | str | None,
        num_speculations: int | str | None,
        draft_threshold: float | None,
        draft_source: str | DraftSource | None,
        model: LayerSkipModel,
        max_speculations: int,
    ) -> Method:
        """What a request asks for, checked, with these defaults in the place of None."""
        exit_layer = self.exit_layer if exit_layer is None else exit_layer
        num_speculations = self.num_speculations if num_speculations is None else num_speculations
        draft_threshold = self.draft_threshold if draft_threshold is None else draft_threshold
        method = Method(
            validation.strategy(strategy),
            validation.exit_layer_or_auto(exit_layer, model.num_layers),
            validation.num_speculations_or_auto(num_speculations, max_speculations),
            validation.real("draft_threshold", draft_threshold, 0.0, 1.0),
            source_of(self.draft_source if draft_source is None else draft_source),
        )
        if strategy == "early_exit" and method.exit_layer is None:
            raise ValueError(f"exit_layer must be an int for the strategy early_exit, got {exit_layer!r}")
        if strategy == "self_speculative" and method.exits and model.exit_layer is not None:
            validation.exit_layer_of_exit(method.exit_layer, model.exit_layer)
        return method if strategy == "self_speculative" and method.exits else replace(method, draft_threshold=0.0)


class RoundKind(NamedTuple):
    """What sequences must have in common to share a round.

    ``exit_layer`` is the layer that drafts or, without speculation, the layer whose tokens are emitted. It is 0 where
    all drafts are looked up; such sequences may join any round in which others speculate.

    Greedy sequences share rounds whatever number of drafts each asks for, because more drafts change no greedy token.
    Their ``num_speculations`` is 0 here, and the round drafts the most that any of them needs. For sequences that draw,
    the number of drafts decides which noise a token is drawn with, so here it is what each of them asks for.
    """

    speculative: bool
    exit_layer: int
    num_speculations: int
    draft_threshold: float
    processed: bool


@dataclass(eq=False)
class Request:
    """A request and its state; ``exit_layer`` and ``num_speculations`` are those of its next round.

    ``tokens`` are its prompt's. It may ``keep`` its row of the cache when it ends, and continues the one of the request
    ``continues``. ``reported`` of its tokens were in updates. ``looked_up`` are the drafts of its next round, or None
    where an exit makes them. An exit's draft layers have read the tokens before ``draft_layers_done``.
    """

    id: int
    method: Method
    sampling: SamplingParams
    seed: int
    sequence: TokenSequence
    reading: Reading
    logits_processor: LogitsProcessor | None
    acceptance: AcceptanceRates
    keep: bool = False
    continues: int | None = None
    reported: int = 0
    lookup: Lookup | None = None
    looked_up: list[int] | None = None
    exit_layer: int = field(init=False)
    num_speculations: int = field(init=False)
    tokens: list[int] = field(init=False)
    draft_layers_done: int = field(init=False)

    def __post_init__(self) -> None:
        self.exit_layer, self.num_speculations = self.method.exit_layer or 0, self.method.num_speculations or 0
        self.tokens = self.sequence.prompt[0].tolist()
        self.draft_layers_done = len(self.tokens)

    @property
    def all_tokens(self) -> list[int]:
        """Its prompt's, and the new ones."""
        return self.tokens + self.sequence.tokens

    @property
    def behind(self) -> int:
        """How many tokens an exit's draft layers have to read before it drafts again."""
        return max(0, self.sequence.position - self.draft_layers_done)

    @property
    def slot(self) -> int:
        """Its row of the cache; -1 while it waits."""
        return self.reading.slot

    @property
    def processed(self) -> bool:
        """Whether its logits are written and processed; a threshold on drafts that are drawn needs that, too."""
        if self.logits_processor is not None or self.sampling.processes:
            return True
        return self.method.draft_threshold > 0 and not self.sampling.greedy

    @property
    def useful_drafts(self) -> int:
        """How many drafts of its next round it can emit: a round emits its drafts and one token more."""
        return min(self.num_speculations, self.sequence.remaining - 1)

    @property
    def source(self) -> str:
        """What drafts its next round."""
        if self.method.strategy == "autoregressive":
            return "none"
        return EXIT if self.lookup is None or self.looked_up is None else self.lookup.proposal.source

    def look_up(self, most: int) -> None:
        """Ask its source for drafts of its next round, at most so many."""
        if self.lookup is not None:
            self.lookup.propose(self.sequence.tokens, min(most, self.sequence.remaining - 1))
            self.looked_up = list(self.lookup.proposal.tokens)

    def kind(self) -> RoundKind:
        """The kind of its next round."""
        if self.method.strategy != "self_speculative":
            return RoundKind(False, self.reading.depth, 0, 0.0, self.processed)
        if not self.method.exits:
            return RoundKind(True, 0, 0, 0.0, self.processed)
        num_speculations = 0 if self.sampling.greedy else self.num_speculations
        return RoundKind(True, self.exit_layer, num_speculations, self.method.draft_threshold, self.processed)

    def fault(self, token: int, what: str, layer: int, position: int) -> str | None:
        """The message for a token of -1, by which a head says that its logits are not finite; else None."""
        if token != -1:
            return None
        causes = "the weights or the states hold NaN or infinity"
        if self.processed:
            causes += ", or bias and processors forbid every token"
        return f"{what} after layer {layer} gave logits that are not finite at position {position}; {causes}"
