"""Text while it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import Queue
from typing import Any

from torch import Tensor

from .text import SequenceText


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
