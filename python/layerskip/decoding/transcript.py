"""The tokens of one sequence as they are emitted: cut at the end, counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .output import GenerationOutput, Stats

StopRule = Callable[[list[int]], bool]
"""(the new tokens so far, the one in question last) -> whether the sequence ends with it."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Ending:
    """What ends a sequence: a count, tokens, a rule. A token that does is emitted, nothing after it is."""

    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    should_stop: StopRule | None = None


class Transcript:
    """What one sequence has emitted so far.

    Parameters
    ----------
    prompt : Tensor [1, N], int64
    ending : Ending
    clock : callable
        Seconds.

    Attributes
    ----------
    tokens : list of int
        The new ones.
    reason : str or None
        Why the sequence ended.
    """

    def __init__(self, prompt: Tensor, ending: Ending, clock: Clock = time.perf_counter) -> None:
        self._prompt, self._ending, self._clock = prompt, ending, clock
        self.tokens: list[int] = []
        self.drafted: list[bool] = []
        self.reason: str | None = None
        self._accepted: list[int] = []
        self._num_drafted = 0
        self._started = clock()
        self._first_token_at = self._started

    @property
    def remaining(self) -> int:
        """How many tokens may still be emitted."""
        return self._ending.max_new_tokens - len(self.tokens)

    @property
    def position(self) -> int:
        """Where the last token goes: the cache holds what is before it."""
        return self._prompt.shape[1] + len(self.tokens) - 1

    def add(self, drafts: list[int], token: int, drafted: int, fault: str | None = None) -> None:
        """Emit the accepted ``drafts`` of a round that drafted ``drafted`` tokens, and the full model's own ``token``.

        The first token, which reading the prompt gave, is no round.

        Raises
        ------
        FloatingPointError
            With the ``fault`` of the last token, unless the sequence ends before it.
        """
        before = len(self.tokens)
        self._num_drafted += min(drafted, self.remaining)  # in a batch, a round may draft for others
        for draft in drafts:
            self._emit(draft, True)
            if self.reason is not None:
                break
        else:
            if fault is not None:
                raise FloatingPointError(fault)
            self._emit(token, False)
        if before:
            self._accepted.append(sum(self.drafted[before:]))
        else:
            self._first_token_at = self._clock()

    def _emit(self, token: int, drafted: bool) -> None:
        self.tokens.append(token)
        self.drafted.append(drafted)
        if token in self._ending.eos:
            self.reason = "eos"
        elif self._ending.should_stop is not None and self._ending.should_stop(self.tokens.copy()):
            self.reason = "stop"
        elif self.remaining == 0:
            self.reason = "length"

    def close(self) -> GenerationOutput:
        """The result."""
        stats = Stats(
            prompt_tokens=self._prompt.shape[1],
            new_tokens=len(self.tokens),
            drafted=self._num_drafted,
            accepted_per_round=tuple(self._accepted),
            seconds=self._clock() - self._started,
            time_to_first_token=self._first_token_at - self._started,
        )
        new = torch.tensor([self.tokens], dtype=torch.int64, device=self._prompt.device)
        drafted = torch.tensor([self.drafted], dtype=torch.bool)
        return GenerationOutput(torch.cat([self._prompt, new], 1), new, drafted, (stats,), (self.reason or "",))
