"""Incremental detokenization: whole characters, never retracted, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any, NamedTuple

import torch
from torch import Tensor

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # decoded from an incomplete character
_MAX_BYTES = 4  # of a character, so the most tokens that a character takes
_CONTEXT = 8  # prompt tokens that are decoded with the new ones


class Piece(NamedTuple):
    """A piece of text."""

    text: str
    special: bool  # of a special token


class Detokenizer:
    """Text that each token of a sequence adds, in pieces that never change afterwards.

    The text of a token depends on the tokens before it: SentencePiece drops a leading space, and one character may take
    several tokens. So the last few tokens are decoded again with each new one; the piece is the difference, without an
    incomplete character. Prompt and pieces together are the text of all tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(tokenizer.all_special_ids).union(token for token, kind in added if kind.special)
        self._window: list[int] = []  # tokens to decode: context, then those since the last restart
        self._fresh = 0  # tokens of the window after the context
        self._shown = ""  # text of the window that was returned or belongs to the context
        self._waiting = 0  # tokens since a piece was returned

    def start_after(self, prompt_tokens: Sequence[int]) -> None:
        """Start a continuation of the prompt."""
        self._restart(list(prompt_tokens[-_CONTEXT:]))

    def push(self, token: int) -> list[Piece]:
        """Add a token and return the text that is final now."""
        if token in self._special:
            return [*self.finish(), self._special_piece(token)]
        self._window.append(token)
        self._fresh += 1
        self._waiting += 1
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            # Some tokenizers omit a whole run of bytes until its last character is complete.
            return self.finish() if self._waiting > _MAX_BYTES else []
        whole = text.rstrip(_UNKNOWN)
        if self._waiting > _MAX_BYTES:  # the first of these bytes are invalid, but the last ones may start a character
            whole = max(whole, text[: 1 - _MAX_BYTES], key=len)
        new = whole[len(self._shown) :]
        if not new:
            return []
        self._waiting = 0
        if whole == text:
            self._restart(self._window[-self._fresh :])
        else:
            self._shown = whole
        return [Piece(new, False)]

    def finish(self) -> list[Piece]:
        """Return the rest of the text, with a replacement character for an incomplete one."""
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            text = self._shown + self._decode(self._window[-self._waiting :])
        new = text[len(self._shown) :]
        if new:
            self._restart(self._window[-self._fresh :])
        return [Piece(new, False)] if new else []

    def _special_piece(self, token: int) -> Piece:
        text = self._decode([*self._window, token])
        text = text[len(self._shown) :] if text.startswith(self._shown) else self._decode([token])
        self._restart([token])
        return Piece(text, True)

    def _restart(self, context: list[int]) -> None:
        self._window, self._fresh, self._waiting = context, 0, 0
        self._shown = self._decode(context)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_stop_strings(value: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop_strings must be strings, got {string!r}")
        if not string:
            raise ValueError("stop_strings must not hold an empty string, which would stop everything")
    return strings


class SequenceText:
    """Visible text of one sequence, token by token, up to the first stop string.

    Text that may be the start of a stop string is held back. The stop string that ends first counts, and of several
    the one that starts first, however the text is cut into tokens. Special tokens are matched, visible or not. Once
    ``stopped``, later tokens are ignored.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_string: bool = False,
    ) -> None:
        self._strings = check_stop_strings(stop_strings)
        self._detokenizer = Detokenizer(tokenizer)
        self._skip, self._include = skip_special_tokens, include_stop_string
        self._held: list[Piece] = []
        self.stopped = False

    def start_after(self, prompt_tokens: Sequence[int]) -> None:
        """Start a continuation of the prompt, which is not searched for stop strings."""
        self._detokenizer.start_after(prompt_tokens)

    def push(self, token: int) -> str:
        """Add a token and return the text that is final now."""
        return "" if self.stopped else self._take(self._detokenizer.push(token))

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._take(self._detokenizer.finish())
        return text if self.stopped else text + self._release(sum(len(piece.text) for piece in self._held))

    def _take(self, pieces: list[Piece]) -> str:
        self._held += pieces
        text = "".join(piece.text for piece in self._held)
        found = first_stop(text, self._strings)
        if found is None:
            return self._release(len(text) - undecided(text, self._strings))
        self.stopped = True
        return self._release(found[1] if self._include else found[0])

    def _release(self, count: int) -> str:
        """Remove and return the first ``count`` characters that are held back."""
        released, kept = [], []
        for text, special in self._held:
            if not (special and self._skip):
                released.append(text[:count])
            kept.append(Piece(text[count:], special))
            count = max(0, count - len(text))
        self._held = [piece for piece in kept if piece.text]
        return "".join(released)


def text_after(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text that ``tokens`` add to a prompt, without special tokens."""
    text = SequenceText(tokenizer)
    text.start_after(prompt)
    return "".join(map(text.push, tokens)) + text.finish()


class TextStream:
    """Streamer and iterator of text pieces, none of which is ever retracted.

    The generation calls `put` and `end`, as of transformers' streamers; the reader iterates, afterwards or in another
    thread. Pieces are whole characters of the continuation, without what may become part of a stop string.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    stop_strings : str or sequence of str
        End of the text. The streamer cannot end the generation, so pass the same strings to it, too.
    skip_prompt, skip_special_tokens : bool
    include_stop_string : bool
        End after the stop string instead of before it.
    timeout : float, optional
        Seconds after which the iterator raises ``queue.Empty``: the generating thread may have failed.
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
        """Flush the text that was held back and end the iterator; the stream then accepts another sequence."""
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


class StopStrings:
    """Rule for ``should_stop`` that ends one sequence with the token that completes a stop string.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    stop_strings : str or sequence of str
    prompt : sequence of int
        Tokens before the sequence; not searched.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._start = tokenizer, check_stop_strings(stop_strings), prompt
        self._progress: tuple[SequenceText, int] | None = None  # text and its number of tokens; None after an interrupt

    def __call__(self, new_tokens: Sequence[int]) -> bool:
        """Whether a stop string is complete in all new tokens so far."""
        if self._progress is None:
            tokenizer, stop_strings, prompt = self._start
            text, seen = SequenceText(tokenizer, stop_strings), 0
            text.start_after(prompt)
        else:
            text, seen = self._progress
        self._progress = None
        for token in new_tokens[seen:]:
            text.push(token)
        self._progress = text, len(new_tokens)
        return text.stopped


def stop_rules(
    tokenizer: Any,
    stop_strings: str | Sequence[str],
    prompts: Sequence[Any],
    rules: Sequence[Callable[[list[int]], bool] | None],
) -> list[Callable[[list[int]], bool]]:
    """Make a rule for each prompt that ends its sequence at a stop string, or where its own rule does."""
    if tokenizer is None:
        raise ValueError("stop_strings need a tokenizer; set decoder.tokenizer, which from_pretrained does")
    return [
        _either(StopStrings(tokenizer, stop_strings, torch.as_tensor(prompt).reshape(-1).tolist()), rule)
        for prompt, rule in zip(prompts, rules, strict=True)
    ]


def _either(strings: StopStrings, rule: Callable[[list[int]], bool] | None) -> Callable[[list[int]], bool]:
    return strings if rule is None else lambda tokens: strings(tokens) or rule(tokens)


def first_stop(text: str, strings: Sequence[str]) -> tuple[int, int] | None:
    """Return start and end of the stop string that ends first, of several the one that starts first."""
    starts = [(text.find(string), len(string)) for string in strings]
    found = [(start + length, start) for start, length in starts if start >= 0]
    return min(found)[::-1] if found else None


def undecided(text: str, strings: Sequence[str]) -> int:
    """Return the length of the longest suffix of ``text`` that starts a stop string."""
    longest = max((len(string) for string in strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
