"""One sequence: a prompt and the tokens that are emitted after it, up to its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .output import GenerationOutput, RoundRecord, Stats
from .sending import sent
from .source import EXIT

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
    exit_layer: int
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
        return sent(torch.tensor([self.tokens], dtype=torch.int64), self.prompt.device)

    def add(
        self, drafts: Sequence[int], accepted: int, token: int, fault: str | None = None, source: str = EXIT,
        exit_layer: int = 0,
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


class History:
    """The tokens of a sequence on the device, for logits processors: prompt, emitted tokens, drafts of this round.

    Parameters
    ----------
    prompt : Tensor [1, N], int64
    room : int
        How many tokens and drafts may follow.
    """

    def __init__(self, prompt: Tensor, room: int) -> None:
        self._tokens = torch.cat([prompt[0], prompt.new_zeros(room)])
        self._length = prompt.shape[1]

    def append(self, tokens: Sequence[int]) -> None:
        """Add emitted tokens, in the place of the drafts."""
        end = self._length + len(tokens)
        self._tokens[self._length : end] = torch.tensor(tokens, dtype=torch.int64)
        self._length = end

    def put_draft(self, index: int, token: Tensor) -> None:
        """Set draft ``index`` of this round. A draft that was not made is stored as token 0; nobody reads past it."""
        self._tokens[self._length + index] = token.clamp_min(0)

    def before(self, num_drafts: int) -> Tensor:
        """The tokens before the position that follows the first ``num_drafts`` drafts, a view [n]."""
        return self._tokens[: self._length + num_drafts]
