"""Render results: tables, decode traces as text, draft counts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from ..decoding import RoundRecord, Stats

# The names of decoding methods in reports.
AUTOREGRESSIVE = "autoregressive"
SELF_SPECULATIVE = "self-speculative"
TRANSFORMERS = "transformers"
EARLY_EXIT_ASSISTED = "transformers, early exit"


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], unwrapped: Sequence[str] = (), **style: Any
) -> Table:
    """A table of ``rows`` with a title on the left; columns in ``unwrapped`` keep each cell on one line."""
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, no_wrap=column in unwrapped, **style)
    for row in rows:
        shown.add_row(*row)
    return shown


@dataclass
class Trace:
    """A sequence as text: ``pieces`` are the texts of its new tokens, ``rounds`` the draft tokens of each round."""

    pieces: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], records: Sequence[RoundRecord]) -> Trace:
        """Decode the new ``tokens`` of a prompt, and the draft tokens of their rounds."""
        rounds, place = [], 1
        for record in records:
            drafts = pieces(tokenizer, [*prompt, *tokens[:place]], record.drafts)
            rounds.append(
                {"source": record.source, "exit_layer": record.exit_layer or 0, "drafts": drafts,
                 "accepted": record.accepted, "emitted": record.emitted}
            )  # fmt: skip
            place += record.emitted
        return cls(pieces(tokenizer, prompt, tokens), rounds)


def pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those ``before`` it; a character of several tokens belongs to the last."""
    from ..decoding.detokenizer import SequenceText

    text = SequenceText(tokenizer, skip_special_tokens=False)
    text.start_after(before)
    texts = [text.push(token) for token in tokens]
    if texts:
        texts[-1] += text.finish()
    return texts


SHOWN_POSITIONS = 4  # of a round; the counts of later draft tokens are left out


@dataclass
class Drafts:
    """Draft token counts [drafted, accepted] by source: in total, and by position in the round."""

    by_source: dict[str, list[int]] = field(default_factory=dict)
    by_position: dict[str, list[list[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, stats: Stats) -> Drafts:
        by_position = {name: [list(count) for count in counts] for name, counts in stats.by_position.items()}
        return cls({name: list(count) for name, count in stats.by_source.items()}, by_position)

    @classmethod
    def sum(cls, parts: Iterable[Drafts]) -> Drafts:
        total = cls()
        for part in parts:
            for name, count in part.by_source.items():
                total.by_source[name] = _add(total.by_source.get(name, [0, 0]), count)
            for name, counts in part.by_position.items():
                pairs = zip_longest(total.by_position.get(name, []), counts, fillvalue=[0, 0])
                total.by_position[name] = [_add(*pair) for pair in pairs]
        return total

    def __str__(self) -> str:
        """Accepted of drafted tokens by source, and the acceptance rate at each of the first positions."""
        texts = []
        for name, (drafted, accepted) in self.by_source.items():
            counts = self.by_position.get(name, [])[:SHOWN_POSITIONS]
            rates = "/".join(f"{accepted / drafted:.0%}" for drafted, accepted in counts)
            texts.append(f"{name} {accepted} of {drafted}" + (f" ({rates})" if rates else ""))
        return ", ".join(texts)


def _add(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]
