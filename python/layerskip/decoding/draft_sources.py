"""Draft sources: where drafts come from that no exit of the model makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from . import validation
from .adaptive import LONGEST_MATCH, Kind, Offer

EXIT, NGRAM, AUTO = SOURCES = ("exit", "ngram", "auto")
"""The sources that have names: an exit of the model, text that occurred before, and whichever of both is faster."""

GRADES: Mapping[int, int] = {1: 2, 2: 4, 3: 12}
"""Tokens to draft after a match of so many: the longer the match, the likelier its continuation."""

_BORDER = -1  # between texts


class DraftSource:
    """What proposes the next tokens of a sequence. A subclass has `propose`, and `new` if it keeps a state.

    Proposals change the speed and nothing else: the model verifies every token, from layer 0. So any guess will do,
    from a cache of answers, a grammar, a smaller model, …

    Attributes
    ----------
    max_drafts : int
        The most tokens of a proposal that are used; the cache needs room for them.
    match : int
        How sure the last proposal is, on any scale of small whole numbers. The controller learns for each of them how
        often the first, the second and a later token of such a proposal is right.
    match_grows : bool
        Whether ``match`` is a length to which every token that was right adds one.
    """

    max_drafts: int = 12
    match: int = 0
    match_grows: bool = False

    @property
    def name(self) -> str:
        """What statistics call the source; by default the class's name."""
        return type(self).__name__

    def new(self) -> DraftSource:
        """The source for one sequence: a new object, if it keeps a state; by default itself."""
        return self

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        """The tokens that may follow.

        Parameters
        ----------
        history : sequence of int
            The prompt and all tokens after it. It is the same list in every call, which has only grown: what a source
            keeps about it stays true. It must not be changed.

        Returns
        -------
        sequence of int
            Token ids; none, where there is nothing to propose.
        """
        raise NotImplementedError(f"{type(self).__name__} has no propose(history)")


class NgramSource(DraftSource):
    """Drafts what followed the last tokens where they occurred before (Saxena 2023, "prompt lookup decoding").

    The longest n-gram at the end of the text that occurred before, in it or in ``texts``, gives the continuation; of
    equally long ones the last. It costs the same for every token, however long the text is: a table holds for every
    n-gram where it was last.

    Parameters
    ----------
    texts : sequence of sequences of int
        Token ids of texts that the output may repeat, besides its prompt: a file that is being edited, documents.
    grades : mapping of int to int
        By the length of an n-gram, how many tokens to draft after it.

    Raises
    ------
    ValueError, TypeError
        With the offending length or number of tokens.
    """

    name = NGRAM
    match_grows = True

    def __init__(self, texts: Sequence[Sequence[int]] = (), grades: Mapping[int, int] = GRADES) -> None:
        if not grades:
            raise ValueError("grades must hold at least one length of n-grams")
        for length, count in grades.items():
            validation.at_least_one("a length of n-grams in grades", length)
            validation.integer_in(f"grades[{length}]", count, 1, validation.MAX_NUM_SPECULATIONS)
        self._grades = sorted(grades.items(), reverse=True)
        self.max_drafts = max(grades.values())
        self._texts, self._own = self._table(), self._table()
        self._texts.extend([token for text in texts for token in (*map(_text_token, text), _BORDER)])

    def _table(self) -> _Table:
        return _Table([length for length, _ in self._grades])

    def new(self) -> NgramSource:
        """Another one, which shares the texts."""
        made = object.__new__(NgramSource)
        made._grades, made.max_drafts, made._texts = self._grades, self.max_drafts, self._texts
        made._own = made._table()
        return made

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        """See `DraftSource.propose`."""
        self._own.extend(history)
        for length, count in self._grades:
            if length > len(history):
                continue
            gram = tuple(history[-length:])
            place = self._own.places.get(gram)
            if place is not None:
                self.match = self._own.match_length(place, history, length)
                return _repeated(history[place : place + count], count)
            place = self._texts.places.get(gram)
            if place is not None:
                self.match = self._texts.match_length(place, history, length)
                return self._texts.up_to_border(place, count)
        self.match = 0
        return ()


class _Table:
    """For every n-gram of a text, of some lengths, the place after its last occurrence that something follows."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self.tokens: Sequence[int] = ()
        self.places: dict[tuple[int, ...], int] = {}
        self._done = 1

    def extend(self, tokens: Sequence[int]) -> None:
        """Take account of ``tokens``, which begin with those of the last call."""
        self.tokens, places = tokens, self.places
        for place in range(self._done, len(tokens)):
            if tokens[place] != _BORDER:
                for length in self._lengths:
                    if length <= place:
                        places[tuple(tokens[place - length : place])] = place
            self._done = place + 1

    def match_length(self, place: int, history: Sequence[int], length: int) -> int:
        """How many tokens before ``place`` are the last of ``history``; ``length`` of them are known to be."""
        most = min(place, len(history), LONGEST_MATCH)
        while length < most and self.tokens[place - 1 - length] == history[-1 - length]:
            length += 1
        return length

    def up_to_border(self, place: int, count: int) -> Sequence[int]:
        """The next ``count`` tokens of a text, or fewer at its end."""
        found = self.tokens[place : place + count]
        return found[: found.index(_BORDER)] if _BORDER in found else found


def _repeated(tokens: Sequence[int], count: int) -> Sequence[int]:
    """What has repeated itself up to the end of the text, going on to do so up to ``count`` tokens."""
    return tokens if len(tokens) == count else [tokens[index % len(tokens)] for index in range(count)]


def _text_token(value: Any) -> int:
    return validation.integer_in("a token of texts", value, 0)


def source_of(value: Any) -> str | DraftSource:
    """A source by name, or one's own; checked."""
    if isinstance(value, DraftSource):
        validation.integer_in(f"max_drafts of {value.name}", value.max_drafts, 1, validation.MAX_NUM_SPECULATIONS)
        return value
    if value not in SOURCES:
        names = ", ".join(map(repr, SOURCES))
        raise ValueError(f"draft_source must be one of {names}, or a DraftSource, got {value!r}")
    return value


def max_drafts(source: str | DraftSource) -> int:
    """The most tokens that are looked up at once."""
    if isinstance(source, DraftSource):
        return source.max_drafts
    return 0 if source == EXIT else max(GRADES.values())


class Lookup:
    """A source at work on one sequence.

    Parameters
    ----------
    source : DraftSource
        Of this sequence alone.
    prompt : list of int
    vocab_size : int

    Attributes
    ----------
    proposal : list of int
        What was proposed last, whether it is drafted or not.
    offer : Offer
        The same, as the controller weighs it.
    """

    def __init__(self, source: DraftSource, prompt: list[int], vocab_size: int) -> None:
        self._source, self._history, self._vocab_size = source, list(prompt), vocab_size
        self._prompt_tokens = len(prompt)
        self.proposal: list[int] = []
        self.offer = Offer(0, Kind(source.name, 0, source.match_grows))

    @property
    def name(self) -> str:
        """The source's."""
        return self._source.name

    def _offer(self, proposal: list[int]) -> None:
        source = self._source
        self.proposal, self.offer = proposal, Offer(len(proposal), Kind(source.name, source.match, source.match_grows))

    def propose(self, tokens: Sequence[int], most: int) -> None:
        """Ask for what may follow the prompt and these new ``tokens``; at most so many are taken.

        Raises
        ------
        ValueError, TypeError
            If one of them is no token of the vocabulary.
        Exception
            What a user's own source raises.
        """
        self._history.extend(tokens[len(self._history) - self._prompt_tokens :])
        self._offer(self._found(most) if most > 0 else [])

    def _found(self, most: int) -> list[int]:
        found = self._source.propose(self._history)
        if isinstance(found, str) or not isinstance(found, Sequence):
            raise TypeError(f"the draft source {self.name} must give a sequence of token ids, got {found!r}")
        return [self._token(token) for token in found[:most]]

    def _token(self, value: Any) -> int:
        if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise TypeError(f"the draft source {self.name} must give token ids, got {value!r}")
        token = int(value)
        if not 0 <= token < self._vocab_size:
            raise ValueError(
                f"the draft source {self.name} proposed token id {token}, outside the vocabulary of {self._vocab_size}"
            )
        return token
