"""Measured ops as a table, a picture, and a part of a document."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .cases import PLAIN
from .harness import OURS

BEGIN, END = "<!-- python -m benchmarks: begin -->", "<!-- python -m benchmarks: end -->"
TORCH = "torch"
Rows = Sequence[dict[str, Any]]


def _timed(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int, str, str], dict[str, Any]]:
    return {
        (row["op"], row["model"], row["rows"], row["variant"], row["weights"]): row for row in rows if "cold" in row
    }


def markdown(rows: Rows) -> str:
    """For each op and model: one row's time and share of the memory's speed, what more rows cost, torch beside it."""
    timed = _timed(rows)
    counts = sorted({row["rows"] for row in rows})
    least, more = counts[0], counts[1:]
    names = [
        "op", "model", "shape", "weights", f"{least} row, µs (10–90 %)", "of memory", "warm, µs",
        *(f"{count} rows" for count in more), *(f"torch, {count}" for count in counts),
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (op, model, count, variant, weights), row in timed.items():
        if variant != OURS or count != least:
            continue
        cold, warm = row["cold"], row["warm"]["median"]
        ours = [timed[op, model, other, OURS, weights]["cold"]["median"] for other in counts]
        torch_ = [timed[op, model, other, TORCH, PLAIN]["cold"]["median"] for other in counts]
        cells = [
            op, model, row["shape"], weights,
            f"{cold['median'] * 1e6:.0f} ({cold['p10'] * 1e6:.0f}–{cold['p90'] * 1e6:.0f})",
            f"{row['GB/s'] / row['memory GB/s']:.0%}", f"{warm * 1e6:.0f}",
            *(f"{seconds / ours[0]:.2f}×" for seconds in ours[1:]),
            *(f"{other / own:.2f}×" for own, other in zip(ours, torch_, strict=True)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + losses(rows)


def losses(rows: Rows) -> str:
    """Where torch in bf16 is faster than an op of ours, the worst first."""
    timed = _timed(rows)
    found = []
    for (op, model, count, variant, weights), row in timed.items():
        beside = timed.get((op, model, count, TORCH, PLAIN))
        if variant == OURS and beside is not None:
            ratio = beside["cold"]["median"] / row["cold"]["median"]
            if ratio < 1:
                found.append((ratio, f"{op}, {model}, {count} rows, {weights}: {ratio:.2f}×"))
    if not found:
        return "Nowhere here is torch's bf16 faster.\n"
    listed = "".join(f"- {text}\n" for _, text in sorted(found))
    return f"Where torch's bf16 is faster (its time over ours):\n\n{listed}"


def document(text: str, rows: Rows) -> str:
    """A document with what was measured in the place of what stands between its markers; ValueError without them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the document must have {BEGIN!r} and {END!r} once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    machine = rows[0]["machine"]
    memory = statistics.median(row["memory GB/s"] for row in rows if "cold" in row)
    head = (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}; memory read at "
        f"{memory:.0f} GB/s meanwhile (median).\n\n"
    )
    return f"{before}{BEGIN}\n{head}{markdown(rows)}{END}{after}"


def picture(rows: Rows) -> bytes:
    """The time of a call over the number of rows: a panel for each op and model, a line for each way; as PNG."""
    from matplotlib.figure import Figure

    ops, models = (list(dict.fromkeys(row[name] for row in rows)) for name in ("op", "model"))
    figure = Figure(figsize=(3.2 * len(models), 2.6 * len(ops)), layout="constrained")
    panels = figure.subplots(len(ops), len(models), squeeze=False)
    for op, line in zip(ops, panels, strict=True):
        for model, axes in zip(models, line, strict=True):
            own = [row for row in rows if (row["op"], row["model"]) == (op, model) and "cold" in row]
            for variant, weights in dict.fromkeys((row["variant"], row["weights"]) for row in own):
                found = [row for row in own if (row["variant"], row["weights"]) == (variant, weights)]
                label = weights if variant == OURS else variant
                axes.plot(
                    [row["rows"] for row in found], [row["cold"]["median"] * 1e6 for row in found], "o-",
                    label=label, color="gray" if variant == TORCH else None, markersize=3,
                )  # fmt: skip
            axes.set(title=f"{op}, {model}", xlabel="rows", ylabel="µs", ylim=(0, None))
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
