"""The demo's picture: speeds, and which tokens were drafted."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..decoding import GenerationOutput
from .prompts import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
