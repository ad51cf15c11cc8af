"""Text while it is generated: as the streamer that transformers calls, and as a decoder's own iterator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import Queue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import validation
from .text import SequenceText

if TYPE_CHECKING:
    from .decoder import SelfSpeculativeDecoder
    from .session import Session


class TextStream:
    """A streamer that is an iterator of text pieces; no piece is ever taken back.

    Whoever generates calls `put` and `end`, as transformers' streamers have it; whoever reads iterates, in the same
    thread afterwards or in another one meanwhile. The pieces are those of `layerskip.decoding.text.SequenceText`: the
    continuation of the prompt, whole characters, nothing that may still become part of a stop string.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    stop_strings : str or sequence of str
        Where the text ends. The streamer cannot stop the tokens: give the generation the same strings.
    skip_prompt, skip_special_tokens : bool
    include_stop_string : bool
        End after the stop string; by default the text ends before it.
    timeout : float, optional
        Seconds that the iterator waits for a piece, before ``queue.Empty`` is raised: the thread that generates may
        have failed.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: str | Sequence[str] = (),
        *,
        skip_prompt: bool = True,
        skip_special_tokens: bool = True,
        include_stop_string: bool = False,
        timeout: float | None = None,
    ) -> None:
        self._tokenizer, self._skip_prompt, self._timeout = tokenizer, skip_prompt, timeout
        self._options = (stop_strings, skip_special_tokens, include_stop_string)
        self._text = SequenceText(tokenizer, *self._options)
        self._at_prompt = True
        self._pieces: Queue[str | None] = Queue()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._text.stopped

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, N] first, then new tokens [n].

        Raises
        ------
        ValueError
            If there is more than one sequence.
        """
        if value.dim() > 1 and value.shape[0] != 1:
            raise ValueError(f"a TextStream takes one sequence, got {value.shape[0]}")
        tokens = value.reshape(-1).tolist()
        if self._at_prompt:
            self._at_prompt = False
            self._text.start_after(tokens)
            if not self._skip_prompt:
                options = {"skip_special_tokens": self._options[1], "clean_up_tokenization_spaces": False}
                self._offer(self._tokenizer.decode(tokens, **options))
        else:
            for token in tokens:
                self._offer(self._text.push(token))

    def end(self) -> None:
        """Give out what was held back; the iterator ends after it, and the stream is ready for another sequence."""
        self._offer(self._text.finish())
        self._pieces.put(None)
        self._text = SequenceText(self._tokenizer, *self._options)
        self._at_prompt = True

    def _offer(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self._timeout)
        if piece is None:
            raise StopIteration
        return piece


def stream(
    decoder: SelfSpeculativeDecoder,
    prompt: str | Tensor | Sequence[int],
    max_new_tokens: int = 128,
    *,
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    skip_special_tokens: bool = True,
    include_stop_string: bool = False,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Iterator[str]:
    """Continue a prompt, and yield the text in pieces as they become certain.

    It stops at the first token that completes a stop string, also within a round's accepted drafts. Leaving the loop
    ends the generation.

    Parameters
    ----------
    decoder : SelfSpeculativeDecoder
    prompt : str, Tensor [N] or [1, N], or sequence of int
    max_new_tokens : int
    stop_strings : str or sequence of str
        The text ends before the first of them.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        By default the decoder's own.
    skip_special_tokens : bool
    include_stop_string : bool
        The text ends after the stop string.
    generator : torch.Generator, optional
        As in `SelfSpeculativeDecoder.open_session`.
    **options
        As in `Session.add`: ``sampling``, ``eos_token_id``, ``exit_layer``, …

    Returns
    -------
    iterator of str

    Raises
    ------
    ValueError, TypeError
        With the offending value, before the first piece.
    FloatingPointError
        If logits are not finite.
    """
    tokenizer = decoder.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer must be given for a decoder that was not made with from_pretrained")
    text = SequenceText(tokenizer, stop_strings, skip_special_tokens, include_stop_string)
    if isinstance(prompt, str):
        prompt = tokenizer(prompt).input_ids
    ids = validation.prompt(prompt, decoder.model.vocab_size, decoder.model.device)[0].tolist()
    text.start_after(ids)
    ready: list[str] = []

    def ends(tokens: list[int]) -> bool:
        ready.append(text.push(tokens[-1]))
        return text.stopped

    length = validation.length(len(ids), validation.at_least_one("max_new_tokens", max_new_tokens), decoder.max_seq_len)
    most = options.get("num_speculations")
    session = decoder.open_session(1, max_seq_len=length, num_speculations=most, generator=generator)
    session.add(ids, max_new_tokens, should_stop=ends, **options)
    return _pieces(session, text, ready)


def _pieces(session: Session, text: SequenceText, ready: list[str]) -> Iterator[str]:
    while len(session):
        for update in session.step():
            if update.error is not None:
                raise update.error
            if update.reason == "eos":  # the one token that no rule is asked about
                ready.append(text.push(update.tokens[-1]))
            if update.finished:
                ready.append(text.finish())
            yield from filter(None, ready)
            ready.clear()
