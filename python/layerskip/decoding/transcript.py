"""The tokens of one call as they are emitted: cut at the end, streamed, counted."""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor

from .output import GenerationOutput, Stats


class Streamer(Protocol):
    """What transformers calls a streamer: first it is given the prompt, then every group of new tokens."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, N], or new tokens [n]."""

    def end(self) -> None:
        """Take note that nothing follows."""


class Transcript:
    """What one sequence has emitted so far.

    Parameters
    ----------
    prompt : Tensor [1, N], int64
    max_new_tokens : int
    stops : frozenset of int
        The tokens that end the sequence; such a token is emitted, nothing after it is.
    streamer : Streamer, optional
    """

    def __init__(
        self, prompt: Tensor, max_new_tokens: int, stops: frozenset[int], streamer: Streamer | None = None
    ) -> None:
        self._prompt = prompt
        self._limit = max_new_tokens
        self._stops = stops
        self._streamer = streamer
        self._tokens: list[int] = []
        self._from_draft: list[bool] = []
        self._accepted: list[int] = []
        self._drafted = 0
        self._started = time.perf_counter()
        self._first_token_at = 0.0
        if streamer is not None:
            streamer.put(prompt.cpu())

    @property
    def remaining(self) -> int:
        """How many tokens may still be emitted."""
        return self._limit - len(self._tokens)

    @property
    def finished(self) -> bool:
        """Whether the limit or a stop token was reached."""
        return self.remaining == 0 or self._tokens[-1] in self._stops

    def add_first(self, token: int) -> None:
        """Emit the token that reading the prompt gave."""
        self._first_token_at = time.perf_counter()
        self._emit([token], [False])

    def add_round(self, drafts: list[int], next_token: int, drafted: int, fault: str | None = None) -> None:
        """Emit the accepted ``drafts`` of a round that drafted ``drafted`` tokens, and the full model's own.

        A ``fault`` of the latter is an error only where no stop token comes before it.
        """
        tokens = [*drafts, next_token]
        stop = next((index for index, token in enumerate(tokens) if token in self._stops), len(drafts))
        if fault is not None and stop == len(drafts):
            raise FloatingPointError(fault)
        from_draft = [True] * len(drafts) + [False]
        self._drafted += drafted
        self._accepted.append(sum(from_draft[: stop + 1]))
        self._emit(tokens[: stop + 1], from_draft[: stop + 1])

    def _emit(self, tokens: list[int], from_draft: list[bool]) -> None:
        self._tokens += tokens
        self._from_draft += from_draft
        if self._streamer is not None:
            self._streamer.put(torch.tensor(tokens))

    def close(self) -> GenerationOutput:
        """End the stream and return the result."""
        seconds = time.perf_counter() - self._started
        if self._streamer is not None:
            self._streamer.end()
        new = torch.tensor([self._tokens], device=self._prompt.device)
        stats = Stats(
            prompt_tokens=self._prompt.shape[1],
            new_tokens=len(self._tokens),
            drafted=self._drafted,
            accepted_per_round=tuple(self._accepted),
            seconds=seconds,
            time_to_first_token=self._first_token_at - self._started,
        )
        return GenerationOutput(torch.cat([self._prompt, new], 1), torch.tensor([self._from_draft]), stats)
