"""How many drafts of each source were accepted, in all and by their place in the round: counted, and told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..decoding import Stats

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
