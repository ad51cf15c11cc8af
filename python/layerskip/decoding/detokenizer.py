"""The text of tokens as they come: whole characters, never taken back, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any, NamedTuple

import torch
from torch import Tensor

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # ends a decoded text whose last character is not complete
_MAX_BYTES = 4  # of a character, and so the most tokens that a character takes
_CONTEXT = 8  # tokens of the prompt that are decoded with the new ones


class Piece(NamedTuple):
    """Some text, and whether it is that of a special token."""

    text: str
    special: bool


class Detokenizer:
    """The text that each token of one sequence adds, as pieces that never change afterwards.

    The text of a token depends on the tokens before it: SentencePiece drops the space at the start of a text, and the
    bytes of one character may come in several tokens. So the last tokens are decoded again with every new one, and a
    piece is the difference, less a character that is not complete yet. After a prompt, the pieces are its continuation:
    prompt and pieces together are the text of all tokens.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(tokenizer.all_special_ids).union(token for token, kind in added if kind.special)
        self._window: list[int] = []  # the tokens that are decoded: context, then those since the last restart
        self._fresh = 0  # how many of them are not context
        self._shown = ""  # the text of the window that is the context's or was given out
        self._waiting = 0  # how many tokens came since a piece was given out

    def start_after(self, prompt: Sequence[int]) -> None:
        """Begin after ``prompt``."""
        self._restart(list(prompt[-_CONTEXT:]))

    def push(self, token: int) -> list[Piece]:
        """The text that is certain with ``token``."""
        if token in self._special:
            return [*self.finish(), self._whole(token)]
        self._window.append(token)
        self._fresh += 1
        self._waiting += 1
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            # Some tokenizers leave out a run of bytes altogether while its last character is not complete.
            return self.finish() if self._waiting > _MAX_BYTES else []
        whole = text.rstrip(_UNKNOWN)
        if self._waiting > _MAX_BYTES:  # the first of these bytes make no character, but the last ones may begin one
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
        """The text that was held back; an incomplete character gives a replacement character."""
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            text = self._shown + self._decode(self._window[-self._waiting :])
        new = text[len(self._shown) :]
        if new:
            self._restart(self._window[-self._fresh :])
        return [Piece(new, False)] if new else []

    def _whole(self, token: int) -> Piece:
        """The text of a special token, which is always whole."""
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
    """The stop strings as a tuple, none of them empty."""
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop_strings must be strings, got {string!r}")
        if not string:
            raise ValueError("stop_strings must not hold an empty string, which would stop everything")
    return strings


class SequenceText:
    """The visible text of one sequence, token by token, up to the first stop string.

    Text that may be the start of a stop string is held back until that is decided. The first stop string is the one
    that ends first, and of those the one that starts first, so it does not matter how the text is cut into tokens.
    Special tokens are matched, too, visible or not, so ``<|im_end|>`` can be a stop string.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    stop_strings : str or sequence of str
    skip_special_tokens : bool
        Leave the text of special tokens out.
    include_stop_string : bool
        End after the stop string; by default the text ends before it.

    Attributes
    ----------
    stopped : bool
        Whether a stop string was found. What follows it is not text of the sequence.
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

    def start_after(self, prompt: Sequence[int]) -> None:
        """Begin after ``prompt``, which is not searched for stop strings."""
        self._detokenizer.start_after(prompt)

    def push(self, token: int) -> str:
        """The text that is certain now."""
        return "" if self.stopped else self._take(self._detokenizer.push(token))

    def finish(self) -> str:
        """The text that was held back, when no token follows."""
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
        """The first ``count`` characters of what is held, which are then no longer held."""
        released, kept = [], []
        for text, special in self._held:
            if not (special and self._skip):
                released.append(text[:count])
            kept.append(Piece(text[count:], special))
            count = max(0, count - len(text))
        self._held = [piece for piece in kept if piece.text]
        return "".join(released)


class TextStream:
    """A streamer that is an iterator of text pieces; no piece is ever taken back.

    The generation calls `put` and `end`, as it does for transformers' streamers. The reader iterates, afterwards, or
    meanwhile in another thread. The pieces are those of `SequenceText`: the continuation of the
    prompt in whole characters, without what may still become part of a stop string.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    stop_strings : str or sequence of str
        Where the text ends. The streamer cannot end the generation, so give the same strings to it, too.
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
        """Give out what was held back, and end the iterator. The stream is then ready for another sequence."""
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
    """The rule that a sequence ends with the token that completes a stop string; one rule a sequence.

    It is what `Session.add` and `SelfSpeculativeDecoder.generate` take as ``should_stop``.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    stop_strings : str or sequence of str
    prompt : sequence of int
        The tokens before; they are not searched.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._text = SequenceText(tokenizer, stop_strings)
        self._text.start_after(prompt)
        self._seen = 0

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string is complete in the new ``tokens`` so far."""
        for token in tokens[self._seen :]:
            self._text.push(token)
        self._seen = len(tokens)
        return self._text.stopped


def stop_rules(
    tokenizer: Any,
    stop_strings: str | Sequence[str],
    prompts: Sequence[Any],
    rules: Sequence[Callable[[list[int]], bool] | None],
) -> list[Callable[[list[int]], bool]]:
    """For each prompt a rule that ends its sequence at a stop string, or where the prompt's own rule ends it.

    Raises
    ------
    ValueError, TypeError
        If there is no tokenizer, or a stop string is not a string or empty.
    """
    if tokenizer is None:
        raise ValueError("stop_strings need a tokenizer; set decoder.tokenizer, which from_pretrained does")
    return [
        _either(StopStrings(tokenizer, stop_strings, torch.as_tensor(prompt).reshape(-1).tolist()), rule)
        for prompt, rule in zip(prompts, rules, strict=True)
    ]


def _either(strings: StopStrings, rule: Callable[[list[int]], bool] | None) -> Callable[[list[int]], bool]:
    return strings if rule is None else lambda tokens: strings(tokens) or rule(tokens)


def first_stop(text: str, strings: Sequence[str]) -> tuple[int, int] | None:
    """Start and end of the stop string in ``text`` that ends first, and of those the one that starts first."""
    starts = [(text.find(string), len(string)) for string in strings]
    found = [(start + length, start) for start, length in starts if start >= 0]
    return min(found)[::-1] if found else None


def undecided(text: str, strings: Sequence[str]) -> int:
    """The length of the longest suffix of ``text`` that is a prefix of a stop string."""
    longest = max((len(string) for string in strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
