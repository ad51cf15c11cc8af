"""One sequence: a prompt and the tokens that are emitted after it, up to its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .output import DraftCount, GenerationOutput, Stats
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
        self._round_start = 0
        self._accepted: list[int] = []
        self._by_source: dict[str, DraftCount] = {}
        self._by_position: dict[str, list[DraftCount]] = {}
        self._source, self._num_drafted = EXIT, 0
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
        return torch.cat([self.prompt, self.prompt.new_tensor([self.tokens])], 1)

    def add(
        self, accepted: list[int], token: int, num_drafted: int, fault: str | None = None, source: str = EXIT
    ) -> None:
        """Emit the accepted drafts of a round, then the full model's own ``token``, up to the sequence's end.

        The first call emits the token that follows the prompt, which is not counted as a round.

        Parameters
        ----------
        accepted : list of int
        token : int
        num_drafted : int
            How many tokens the round drafted.
        fault : str, optional
            What is wrong with ``token``.
        source : str
            What drafted.

        Raises
        ------
        FloatingPointError
            With ``fault``, unless the sequence ends before ``token``.
        """
        # Other sequences of the batch may need more drafts.
        self._source, self._num_drafted = source, min(num_drafted, self.remaining)
        self._count(self._num_drafted, 0)
        self._round_start, self._fault = len(self.tokens), fault
        self._rest = deque([*((draft, True) for draft in accepted), (token, False)])
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
        except Exception:  # of a rule, in the middle; after an interrupt the rest is still emitted
            self._end_round()
            raise
        finally:
            if self.history is not None:
                self.history.append(self.tokens[before:])
        self._end_round()

    def _end_round(self) -> None:
        if self._round_start:
            accepted = sum(self.drafted[self._round_start :])
            self._accepted.append(accepted)
            self._count(0, accepted)
            self._count_positions(accepted)
        else:
            self._first_token_at = self._clock()

    def _count(self, drafted: int, accepted: int) -> None:
        before = self._by_source.get(self._source, DraftCount(0, 0))
        if drafted or accepted:
            self._by_source[self._source] = DraftCount(before.drafted + drafted, before.accepted + accepted)

    def _count_positions(self, accepted: int) -> None:
        """Of a round: its accepted drafts, and the next one, which was not, unless the sequence ended before it."""
        reached = accepted if self.drafted[-1] else min(accepted + 1, self._num_drafted)
        if reached:
            counts = self._by_position.setdefault(self._source, [])
            counts.extend([DraftCount(0, 0)] * (reached - len(counts)))
            for place in range(reached):
                before = counts[place]
                counts[place] = DraftCount(before.drafted + 1, before.accepted + (place < accepted))

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
            drafted=sum(count.drafted for count in self._by_source.values()),
            accepted_per_round=tuple(self._accepted),
            seconds=self._clock() - self._started,
            time_to_first_token=self._first_token_at - self._started,
            reused=self.reused,
            by_source=dict(self._by_source),
            by_position={name: tuple(counts) for name, counts in self._by_position.items()},
        )
        new = self.prompt.new_tensor([self.tokens])
        drafted = torch.tensor([self.drafted], dtype=torch.bool)
        return GenerationOutput(self.all_tokens, new, drafted, (stats,), (self.reason or "",))


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
