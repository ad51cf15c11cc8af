"""Render decoding results: decode trace as text, draft counts, the demo's picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..decoding import GenerationOutput, RoundRecord
from ..decoding.detokenizer import SequenceText
from .arguments import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..decoding import Stats


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
            rounds.append(ToldRound(record.source, record.exit_layer, texts, record.accepted, record.emitted))
            place += record.emitted
        return cls(pieces(tokenizer, prompt, tokens), rounds)


def pieces(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those ``before`` it; a character of several tokens belongs to the last."""
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


PLAIN, ACCEPTED, GIVEN = "#4c78a8", "#54a24b", "#bab0ac"


@dataclass(frozen=True)
class SideBySide:
    """One prompt, decoded autoregressively and self-speculatively by a model of some name."""

    prompt: Prompt
    model: str
    plain: GenerationOutput
    speculative: GenerationOutput

    @property
    def identical(self) -> bool:
        """Whether both gave the same tokens."""
        return self.plain.sequences.tolist() == self.speculative.sequences.tolist()


def demo_picture(rows: list[SideBySide]) -> bytes:
    """A PNG with one row a prompt: tokens/s on the left, the tokens on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 + 1.1 * len(rows)), layout="constrained")
    speeds, tokens = figure.subplots(1, 2, width_ratios=[2, 3])
    _speeds(speeds, rows)
    _tokens(tokens, rows)
    same = all(row.identical for row in rows)
    figure.suptitle("identical tokens both ways" if same else "THE TOKENS DIFFER")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _speeds(axes: Axes, rows: list[SideBySide]) -> None:
    plain, speculative = [row.plain for row in rows], [row.speculative for row in rows]
    bars = ((-0.2, plain, "autoregressive", PLAIN), (0.2, speculative, "self-speculative", ACCEPTED))
    for offset, outputs, name, colour in bars:
        rates = [out.stats.decode_tokens_per_second for out in outputs]
        positions = [row + offset for row in range(len(rows))]
        axes.bar_label(axes.barh(positions, rates, 0.36, label=name, color=colour), fmt="%.1f", padding=3)
    axes.set_yticks(range(len(rows)), [f"{row.prompt.task}\n{row.model}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("tokens per second, after the first")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _tokens(axes: Axes, rows: list[SideBySide]) -> None:
    """One square a token, in the order of the text."""
    for row, out in enumerate(each.speculative for each in rows):
        flags = out.drafted[0].tolist()
        axes.bar(range(len(flags)), 0.5, 0.9, bottom=row - 0.25, color=[ACCEPTED if flag else GIVEN for flag in flags])
        stats = out.stats
        caption = f"{stats.accepted} of {stats.drafted} drafts accepted ({stats.acceptance_rate:.0%})"
        axes.text(-0.45, row - 0.3, caption, va="bottom", fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_yticks([])
    axes.set_xlabel("new token")
    axes.set_title("green: drafted by the early layers and accepted", fontsize=10)
