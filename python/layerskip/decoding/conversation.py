"""`Conversation`: turns that continue each other, in one slot of a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from . import validation
from .decoder import SelfSpeculativeDecoder
from .outputs import GenerationOutput, Streamer, Update
from .request import Prompt

TRUNCATIONS = ("error", "oldest_turns")


class Conversation:
    """Turns that continue each other.

    A turn reads only what it adds, and gives the tokens of `SelfSpeculativeDecoder.generate` for the whole conversation
    as its prompt.

    Parameters
    ----------
    decoder : SelfSpeculativeDecoder
    max_seq_len : int, optional
        Longest conversation; by default the decoder's.
    num_speculations : int or "auto", optional
        Largest K of a turn; by default the decoder's.
    system : str, Tensor [N] or [1, N], numpy array, BatchEncoding, or sequence of int, optional
        What the conversation begins with, such as a system prompt. It is never dropped.
    truncation : {"error", "oldest_turns"}
        What a turn does that does not fit into ``max_seq_len``: raise ValueError, or drop the oldest turns until it
        does. What follows them is then read again, at its new positions.

    Attributes
    ----------
    tokens : list of int
        What it began with, and all turns so far. Tokens that are appended belong to the last turn. To take turns back,
        `undo` the last one or truncate the list.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """

    def __init__(
        self,
        decoder: SelfSpeculativeDecoder,
        max_seq_len: int | None = None,
        num_speculations: int | str | None = None,
        *,
        system: Prompt | None = None,
        truncation: str = "error",
    ) -> None:
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {', '.join(TRUNCATIONS)}, got {truncation!r}")
        self._model, self._truncation = decoder.model, truncation
        self._session = decoder.open_session(1, max_seq_len=max_seq_len, num_speculations=num_speculations)
        self.tokens: list[int] = []
        self._starts: list[int] = []  # of the turns
        if system is not None:
            self.tokens = self._encode(system)
            validation.length(len(self.tokens), None, self.max_seq_len)

    @property
    def max_seq_len(self) -> int:
        """Longest conversation, in tokens."""
        return self._session.max_seq_len

    @property
    def num_turns(self) -> int:
        """Number of turns in ``tokens``."""
        return len(self._turns())

    def _turns(self) -> list[int]:
        """Return where the turns start; ``tokens`` may have been truncated."""
        return [start for start in self._starts if start < len(self.tokens)]

    def _encode(self, prompt: Prompt) -> list[int]:
        model, tokenizer, first = self._model, self._session.tokenizer, not self.tokens
        ids = validation.prompt(prompt, model.vocab_size, model.device, tokenizer, special_tokens=first)
        tokens: list[int] = ids[0].tolist()
        return tokens

    def undo(self) -> None:
        """Take the last turn back; ValueError if there is none."""
        turns = self._turns()
        if not turns:
            raise ValueError("the conversation has no turn to take back")
        self._starts, self.tokens = turns[:-1], self.tokens[: turns[-1]]

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = 128,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Take a turn.

        Parameters
        ----------
        prompt : str, Tensor [N] or [1, N], numpy array, BatchEncoding, or sequence of int
            What follows the tokens so far. Only the first text gets special tokens, such as BOS.
        max_new_tokens : int, optional
            None decodes up to ``max_seq_len``, of which truncation then makes at least a quarter free.
        streamer : Streamer, optional
            As in transformers.
        **options
            As in `Session.add`: ``sampling``, ``eos_token_id``, ``should_stop``, …

        Returns
        -------
        GenerationOutput
            ``sequences`` [1, N + new] are the whole conversation; ``stats.reused`` counts cached tokens.

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As `SelfSpeculativeDecoder.generate`; the tokens stay as they were.
        """
        output = None
        for update in self._run(self._begin(prompt, max_new_tokens, streamer, options), streamer):
            output = update.output
        assert output is not None
        return output

    def updates(self, prompt: Prompt, max_new_tokens: int | None = 128, **options: Any) -> Iterator[Update]:
        """Take a turn, as `generate` does, and yield the `Update` of every round, the last one with the output.

        Errors in the arguments are raised before the first. Leaving the loop takes the turn back.
        """
        return self._run(self._begin(prompt, max_new_tokens, None, options))

    def _begin(
        self, prompt: Prompt, max_new_tokens: int | None, streamer: Streamer | None, options: dict[str, Any]
    ) -> list[int]:
        """Add the request of a turn; return where the turns will start."""
        tokens, turns, new = self.tokens, self._turns(), self._encode(prompt)
        if self._truncation == "oldest_turns":
            reserve = self.max_seq_len // 4
            if max_new_tokens is not None:
                reserve = validation.at_least_one("max_new_tokens", max_new_tokens)
            while turns and len(tokens) + len(new) + reserve > self.max_seq_len:
                end = turns[1] if len(turns) > 1 else len(tokens)
                tokens = tokens[: turns[0]] + tokens[end:]
                turns = [start - (end - turns[0]) for start in turns[1:]]
        for unfinished in self._session.unfinished:  # of a turn that an exception left
            self._session.remove(unfinished)
        self._session.add(tokens + new, max_new_tokens, keep=True, **options)
        if streamer is not None:
            streamer.put(torch.tensor([new]))
        return [*turns, len(tokens)]

    def _run(self, starts: list[int], streamer: Streamer | None = None) -> Iterator[Update]:
        for update in self._session.run(streamer):
            if update.output is not None:
                self._starts, self.tokens = starts, update.output.sequences[0].tolist()
            yield update
