"""Render decoding results: decode trace as text, draft counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..decoding import RoundRecord, Stats


@dataclass
class ToldRound:
    """A `RoundRecord` with the drafts' texts in the place of their tokens."""

    source: str
    exit_layer: int
    drafts: list[str]
    accepted: int
    emitted: int


@dataclass
class Told:
    """The texts of the new tokens, which together are the new text, and the rounds that gave them."""

    pieces: list[str] = field(default_factory=list)
    rounds: list[ToldRound] = field(default_factory=list)

    @classmethod
    def of(cls, tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], records: Sequence[RoundRecord]) -> Told:
        """Of one sequence: its prompt, its new tokens, and its rounds."""
        rounds, place = [], 1
        for record in records:
            before = [*prompt, *tokens[:place]]
            texts = pieces(tokenizer, before, record.drafts)
            rounds.append(ToldRound(record.source, record.exit_layer or 0, texts, record.accepted, record.emitted))
            place += record.emitted
        return cls(pieces(tokenizer, prompt, tokens), rounds)


def pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those ``before`` it; a character of several tokens belongs to the last."""
    from ..decoding.detokenizer import SequenceText  # with torch, which counting drafts does not need

    text = SequenceText(tokenizer, skip_special_tokens=False)
    text.start_after(before)
    texts = [text.push(token) for token in tokens]
    if texts:
        texts[-1] += text.finish()
    return texts


TOLD = 4  # places in a round; a longer draft's others are left out


@dataclass
class Drafts:
    """Of some decoding, by the names of the sources: [drafted, accepted] in all, and by place as `Stats` has them."""

    by_source: dict[str, list[int]] = field(default_factory=dict)
    by_position: dict[str, list[list[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, stats: Stats) -> Drafts:
        """Those of a call."""
        places = {name: [list(count) for count in counts] for name, counts in stats.by_position.items()}
        return cls({name: list(count) for name, count in stats.by_source.items()}, places)

    @classmethod
    def sum(cls, parts: Iterable[Drafts]) -> Drafts:
        """Those of all parts."""
        total = cls()
        for part in parts:
            for name, count in part.by_source.items():
                total.by_source[name] = _added(total.by_source.get(name, [0, 0]), count)
            for name, counts in part.by_position.items():
                pairs = zip_longest(total.by_position.get(name, []), counts, fillvalue=[0, 0])
                total.by_position[name] = [_added(*pair) for pair in pairs]
        return total

    def __str__(self) -> str:
        """By source how many, and how often the first, the second, … of a round was, where those before it were."""
        told = (
            f"{name} {accepted} of {drafted}{_places(self.by_position.get(name, []))}"
            for name, (drafted, accepted) in self.by_source.items()
        )
        return ", ".join(told)


def _added(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [mine + its for mine, its in zip(one, other, strict=True)]


def _places(counts: Sequence[Sequence[int]]) -> str:
    shares = [f"{accepted / drafted:.0%}" for drafted, accepted in counts[:TOLD]]
    return f" ({'/'.join(shares)})" if shares else ""
