"""The demo's picture: speeds, and which tokens were drafted."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ..decoding import GenerationOutput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN, ACCEPTED, GIVEN = "#4c78a8", "#54a24b", "#bab0ac"


def demo_picture(rows: list[tuple[str, GenerationOutput, GenerationOutput]]) -> bytes:
    """A PNG of (label, autoregressive, self-speculative) rows: tokens/s on the left, the tokens on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 + 1.1 * len(rows)), layout="constrained")
    speeds, tokens = figure.subplots(1, 2, width_ratios=[2, 3])
    _speeds(speeds, rows)
    _tokens(tokens, rows)
    same = all(plain.sequences.tolist() == other.sequences.tolist() for _, plain, other in rows)
    figure.suptitle("identical tokens both ways" if same else "THE TOKENS DIFFER")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _speeds(axes: Axes, rows: list[tuple[str, GenerationOutput, GenerationOutput]]) -> None:
    for offset, index, name, colour in ((-0.2, 1, "autoregressive", PLAIN), (0.2, 2, "self-speculative", ACCEPTED)):
        rates = [row[index].stats.decode_tokens_per_second for row in rows]
        positions = [row + offset for row in range(len(rows))]
        axes.bar_label(axes.barh(positions, rates, 0.36, label=name, color=colour), fmt="%.1f", padding=3)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("tokens per second, after the first")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _tokens(axes: Axes, rows: list[tuple[str, GenerationOutput, GenerationOutput]]) -> None:
    """One square a token, in the order of the text."""
    for row, (_, _, out) in enumerate(rows):
        flags = out.drafted[0].tolist()
        axes.bar(range(len(flags)), 0.5, 0.9, bottom=row - 0.25, color=[ACCEPTED if flag else GIVEN for flag in flags])
        stats = out.stats
        caption = f"{stats.accepted} of {stats.drafted} drafts accepted ({stats.acceptance_rate:.0%})"
        axes.text(0, row - 0.3, caption, va="bottom", fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_yticks([])
    axes.set_xlabel("token")
    axes.set_title("green: drafted by the early layers and accepted", fontsize=10)
