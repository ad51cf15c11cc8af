"""Text of tokens as they come: what is given out stays, whole characters only, and it ends at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands at the end of a decoded text where a character is not complete
_CHARACTER = 4  # bytes, and so tokens, that a character takes at most
_CONTEXT = 8  # tokens of the prompt that decoding looks back to


class Piece(NamedTuple):
    """Some text, and whether it is that of a special token."""

    text: str
    special: bool


class Detokenizer:
    """The text that each token of one sequence adds, as pieces that never change afterwards.

    A tokenizer decodes a token by what is before it: SentencePiece drops the space at the start of a text, and bytes of
    one character may come in several tokens. So the last tokens are decoded again with every new one, and what is given
    out is the difference, less a character that is not complete yet. After a prompt, the pieces are its continuation:
    prompt and pieces make the text of all tokens.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(tokenizer.all_special_ids).union(token for token, kind in added if kind.special)
        self._window: list[int] = []  # context, and the tokens after the last whole character
        self._fresh = 0  # how many of the latter there are
        self._shown = ""  # text of the window that is given out, or is the context's
        self._waiting = 0  # tokens since something was given out

    def start_after(self, prompt: Sequence[int]) -> None:
        """Begin after ``prompt``."""
        self._restart(list(prompt[-_CONTEXT:]))

    def push(self, token: int) -> list[Piece]:
        """What is certain now that ``token`` is there."""
        if token in self._special:
            return [*self.finish(), self._whole(token)]
        self._window.append(token)
        self._fresh += 1
        self._waiting += 1
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            # With bytes missing at its end, some decoders take a run of bytes for none at all.
            return self.finish() if self._waiting > _CHARACTER else []
        whole = text.rstrip(_UNKNOWN)
        if self._waiting > _CHARACTER:  # not all of these bytes make a character, but the last ones may begin one
            whole = max(whole, text[: 1 - _CHARACTER], key=len)
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
        """What was held back; incomplete characters are the decoder's replacement."""
        text = self._decode(self._window)
        if not text.startswith(self._shown):
            text = self._shown + self._decode(self._window[-self._waiting :])
        new = text[len(self._shown) :]
        if new:
            self._restart(self._window[-self._fresh :])
        return [Piece(new, False)] if new else []

    def _whole(self, token: int) -> Piece:
        """A special token: always a text by itself."""
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
    """The stop strings, each of them not empty."""
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop_strings must be strings, got {string!r}")
        if not string:
            raise ValueError("stop_strings must not hold an empty string, which would stop everything")
    return strings


class SequenceText:
    """The visible text of one sequence, token by token, up to the first stop string.

    Text that may become a stop string is held back until that is decided. The first stop string is the one that ends
    first, and of those the one that starts first: how the text is cut into tokens does not matter. Special tokens count
    in matching, so that ``<|im_end|>`` can be a stop string, whether or not they are visible.

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
        """Begin after ``prompt``, in which no stop string is looked for."""
        self._detokenizer.start_after(prompt)

    def push(self, token: int) -> str:
        """The text that is certain now."""
        return "" if self.stopped else self._take(self._detokenizer.push(token))

    def finish(self) -> str:
        """The text that was held back: nothing follows that could make a stop string of it."""
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
        """Give out the first ``count`` characters of what is held."""
        released, kept = [], []
        for text, special in self._held:
            if not (special and self._skip):
                released.append(text[:count])
            kept.append(Piece(text[count:], special))
            count = max(0, count - len(text))
        self._held = [piece for piece in kept if piece.text]
        return "".join(released)


class StopStrings:
    """The rule that a sequence ends with the token that completes a stop string; one rule a sequence.

    It is what `Session.add` and `SelfSpeculativeDecoder.generate` take as ``should_stop``.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    stop_strings : str or sequence of str
    prompt : sequence of int
        What comes before; no stop string is looked for in it.
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
    """For each prompt a rule that ends at a stop string, or where its own rule says so, if it has one.

    Raises
    ------
    ValueError, TypeError
        If there is no tokenizer, or a stop string is none.
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
    """Length of the longest end of ``text`` that a stop string starts with."""
    longest = max((len(string) for string in strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0
