"""Draft sources: lookup of draft tokens in earlier text, or in a source of the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from itertools import cycle, islice
from numbers import Integral
from typing import Any

from . import validation
from .adaptive import LONGEST_MATCH, Proposal

EXIT, NGRAM, AUTO = SOURCES = ("exit", "ngram", "auto")
"""Named sources: an exit of the model, prompt lookup, and whichever is faster."""

GRADES: Mapping[int, int] = {1: 2, 2: 4, 3: 12}
"""Number of draft tokens by the length of the matching n-gram: longer matches are more reliable."""

_BORDER = -1  # between texts


class DraftSource:
    """Source of draft tokens. A subclass has `propose`, and `new` if it keeps a state.

    Proposals change the speed and nothing else: the model verifies every token, from layer 0. Any guess will do, of a
    cache of answers, a grammar or a smaller model.

    Attributes
    ----------
    max_drafts : int
        The most tokens of a proposal that are used; the cache needs room for them.
    match : int
        Reliability of the last proposal, on any scale of small integers. The controller learns for each value how often
        the first, second and later tokens are accepted.
    match_grows : bool
        Whether ``match`` is a length that grows by one with every correct token.
    """

    max_drafts: int = 12
    match: int = 0
    match_grows: bool = False

    @property
    def name(self) -> str:
        """Name in statistics; by default the name of the class."""
        return type(self).__name__

    def new(self) -> DraftSource:
        """Return the source for one sequence: a new object if it keeps a state, by default itself."""
        return self

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        """Propose the next tokens.

        Parameters
        ----------
        history : sequence of int
            Prompt and new tokens. It is the same list in every call and only grows; it must not be changed.

        Returns
        -------
        sequence of int
            Token ids, possibly none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no propose(history)")


class NgramSource(DraftSource):
    """Drafts what followed an earlier occurrence of the last tokens (Saxena 2023, "prompt lookup decoding").

    The longest n-gram at the end of the text that occurred before, in it or in ``texts``, gives the continuation; of
    several occurrences the last one. The cost per token does not depend on the length of the text.

    Parameters
    ----------
    texts : sequence of sequences of int
        Token ids of further texts that the output may repeat: a file that is being edited, documents.
    grades : mapping of int to int
        Number of draft tokens by the length of the n-gram.

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
        self.max_drafts = max(grades.values())
        self._grades = sorted(grades.items(), reverse=True)
        self._texts, self._own = _NgramTable(grades), _NgramTable(grades)
        tokens: list[int] = []
        for text in texts:
            tokens += [validation.integer_in("a token of texts", token, 0) for token in text]
            tokens.append(_BORDER)
        self._texts.extend(tokens)

    def new(self) -> NgramSource:
        """Return a source for another sequence that shares the texts."""
        made = copy(self)
        made._own = _NgramTable(dict(self._grades))
        return made

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        """Propose the continuation of the longest match."""
        self._own.extend(history)
        for length, count in self._grades:
            gram = tuple(history[-length:]) if length <= len(history) else ()
            for table in (self._own, self._texts):
                place = table.places.get(gram)
                if place is None:
                    continue
                self.match = table.match_length(place, history, length)
                found = table.tokens[place : place + count]
                if table is self._own:  # shorter at the end of the text: then it repeats itself
                    return list(islice(cycle(found), count))
                return found[: found.index(_BORDER)] if _BORDER in found else found
        self.match = 0
        return ()


class _NgramTable:
    """For every n-gram of a text, the place after its last occurrence that is followed by a token."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self._lengths = tuple(lengths)
        self.tokens: Sequence[int] = ()
        self.places: dict[tuple[int, ...], int] = {}
        self._done = 1

    def extend(self, all_tokens: Sequence[int]) -> None:
        """Add the tokens after those of the last call."""
        self.tokens, places = all_tokens, self.places
        for place in range(self._done, len(all_tokens)):
            if all_tokens[place] != _BORDER:
                for length in self._lengths:
                    if length <= place:
                        places[tuple(all_tokens[place - length : place])] = place
            self._done = place + 1

    def match_length(self, place: int, history: Sequence[int], length: int) -> int:
        """Extend a match of ``length`` tokens before ``place`` with the end of ``history`` to the left."""
        longest = min(place, len(history), LONGEST_MATCH)
        while length < longest and self.tokens[place - 1 - length] == history[-1 - length]:
            length += 1
        return length


def source_of(value: Any) -> str | DraftSource:
    """Check a source: a name or a `DraftSource`."""
    if isinstance(value, DraftSource):
        validation.integer_in(f"max_drafts of {value.name}", value.max_drafts, 1, validation.MAX_NUM_SPECULATIONS)
        return value
    if value not in SOURCES:
        names = ", ".join(map(repr, SOURCES))
        raise ValueError(f"draft_source must be one of {names}, or a DraftSource, got {value!r}")
    return value


def max_drafts(source: str | DraftSource) -> int:
    """Return the longest proposal of a source."""
    if isinstance(source, DraftSource):
        return source.max_drafts
    return 0 if source == EXIT else max(GRADES.values())


class Lookup:
    """Lookup of draft tokens for one sequence; ``proposal`` is the last one, whether it is drafted or not."""

    def __init__(self, source: DraftSource, prompt_tokens: list[int], vocab_size: int) -> None:
        self._source, self._history, self._vocab_size = source, list(prompt_tokens), vocab_size
        self._num_prompt_tokens = len(prompt_tokens)
        self.proposal = Proposal((), source.name, 0, source.match_grows)

    def propose(self, new_tokens: Sequence[int], limit: int) -> None:
        """Ask the source for at most ``limit`` tokens after the prompt and these new tokens; check them."""
        source = self._source
        self._history.extend(new_tokens[len(self._history) - self._num_prompt_tokens :])
        found = source.propose(self._history) if limit > 0 else ()
        if isinstance(found, str) or not isinstance(found, Sequence):
            raise TypeError(f"the draft source {source.name} must give a sequence of token ids, got {found!r}")
        for token in found[:limit]:
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise TypeError(f"the draft source {source.name} must give token ids, got {token!r}")
            if not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"the draft source {source.name} proposed token id {token}, outside the vocabulary of "
                    f"{self._vocab_size}"
                )
        drafts = [int(token) for token in found[:limit]]
        self.proposal = Proposal(drafts, source.name, source.match, source.match_grows)
