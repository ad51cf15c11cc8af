"""Measured ops as a page of tables, with a list of losses, and as a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from layerskip_kernels.dispatch import BACKENDS

from .cases import PLAIN

ABSENT = "–"
Rows = Sequence[dict[str, Any]]
Key = tuple[str, int, str, str]  # model, rows, variant, weights


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, without a newline at its end."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def markdown(rows: Rows) -> str:
    """A table for each op, the cases where others are faster, and skipped variants."""
    ops = dict.fromkeys(row["op"] for row in rows)
    return "\n".join([*(_table([row for row in rows if row["op"] == op]) for op in ops), losses(rows), skipped(rows)])


def _timed(rows: Iterable[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    return {(row["model"], row["rows"], row["variant"], row["weights"]): row for row in rows if "cold" in row}


def _own(rows: Iterable[dict[str, Any]]) -> str:
    """The backend that serves by itself: the first of those that were timed."""
    found = {row["variant"] for row in rows if "cold" in row}
    return next((name for name in BACKENDS if name in found), BACKENDS[-1])


def _forms(name: str, weights: str) -> list[str]:
    """The formats in which another stands beside ours: its own of that name; a peer's plain weights beside all."""
    return [weights] if name in BACKENDS else [weights, PLAIN]


def _table(rows: Rows) -> str:
    """Of an op, a line for each model and format: time, share of the memory's speed, more rows, the others' times."""
    timed, own = _timed(rows), _own(rows)
    counts = sorted({row["rows"] for row in rows})
    others = [name for name in dict.fromkeys(row["variant"] for row in rows if "cold" in row) if name != own]
    names = [
        "model", "shape", "weights", f"{_rows(counts[0])}, µs (10–90 %)", "of memory", "warm, µs",
        *(f"× at {_rows(count)}" for count in counts[1:]), *(f"{name}, × at {_listed(counts)}" for name in others),
    ]  # fmt: skip
    lines = []
    for (model, count, variant, weights), row in timed.items():
        if variant != own or count != counts[0]:
            continue
        cold = row["cold"]
        cells = [
            model, row["shape"], weights,
            f"{_us(cold['median'])} ({_us(cold['p10'])}–{_us(cold['p90'])})",
            f"{row['GB/s'] / row['memory GB/s']:.0%}", _us(row["warm"]["median"]) if "warm" in row else ABSENT,
            *(_ratio(timed.get((model, more, own, weights)), row) for more in counts[1:]),
            *(" · ".join(_beside(timed, name, own, model, counts, weights)) for name in others),
        ]  # fmt: skip
        lines.append(cells)
    return f"### {rows[0]['op']}\n\n{markdown_table(names, lines)}\n"


def _beside(
    timed: dict[Key, dict[str, Any]], name: str, own: str, model: str, counts: Sequence[int], weights: str
) -> list[str]:
    """For each count of rows another's time over ours; none where it has no figure for any."""
    found = (form for form in _forms(name, weights) if any((model, count, name, form) in timed for count in counts))
    form = next(found, weights)
    ratios = [
        _ratio(timed.get((model, count, name, form)), timed.get((model, count, own, weights))) for count in counts
    ]
    while ratios and ratios[-1] == ABSENT:
        ratios.pop()
    return ratios or [ABSENT]


def _ratio(row: dict[str, Any] | None, over: dict[str, Any] | None) -> str:
    return ABSENT if row is None or over is None else f"{row['cold']['median'] / over['cold']['median']:.2f}"


def _us(seconds: float) -> str:
    """Microseconds; three digits of those that are few."""
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.2g}"


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _listed(counts: Sequence[int]) -> str:
    return " · ".join(map(str, counts))


def losses(rows: Rows) -> str:
    """Every case in which another is faster than the backend that serves by itself, the worst first."""
    found = []
    for op in dict.fromkeys(row["op"] for row in rows):
        timed = _timed(row for row in rows if row["op"] == op)
        own = _own(timed.values())
        for (model, count, variant, weights), ours in timed.items():
            if variant != own:
                continue
            for (*place, name, form), other in timed.items():
                if place != [model, count] or name == own or form not in _forms(name, weights):
                    continue
                times = [row["cold"]["median"] for row in (other, ours)]
                if times[0] < times[1]:
                    what = f"{op}, {model}, {_rows(count)}, {weights}: {name} in {form}"
                    found.append((times[0] / times[1], f"{what} {_us(times[0])} µs, ours {_us(times[1])} µs"))
    heading = "### Where we lose\n\n"
    if not found:
        return f"{heading}Nothing that was measured here is faster.\n"
    listed = "".join(f"- {ratio:.2f}×: {text}\n" for ratio, text in sorted(found))
    return f"{heading}What is faster, by its time over ours:\n\n{listed}"


def skipped(rows: Rows) -> str:
    """List variants that were not measured or gave wrong results, and why."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        why = row.get("skipped") or row.get("wrong")
        if why:
            reasons.setdefault(f"{row['variant']}: {why}", {})[row["op"]] = None
    if not reasons:
        return ""
    listed = "".join(f"- {what} ({', '.join(ops)})\n" for what, ops in reasons.items())
    return f"### Not measured\n\n{listed}"


HEAD = """# Ops

Written by `make bench`; every sample is in `{samples}`. {where}

Each result is checked against fp32 before it is timed. All implementations of a case take turns. Cold calls
rotate through copies of the weights that no cache holds together; warm calls repeat one copy. "Of memory" is the
bytes of the weights (for attention: of keys and values) over the time, as a share of a plain read in the same
minute. "× at n rows" is the time over that of the fewest rows; the columns of other implementations are their
time over ours, for each number of rows.

![Time over rows]({picture})

"""


def page(rows: Rows, name: str) -> str:
    """Return the Markdown page whose rows are in ``name``.jsonl and whose picture is ``name``.png."""
    machine = rows[0]["machine"]
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows if "cold" in row))
    memory = statistics.median(row["memory GB/s"] for row in rows if "cold" in row)
    where = f"{machine['cpu']}, {machine['isa']}, {machine['device']}, {machine['threads']} threads"
    where = f"{where}; {versions}; memory read at {memory:.0f} GB/s meanwhile (median)."
    return HEAD.format(samples=f"{name}.jsonl", where=where, picture=f"{name}.png") + markdown(rows)


def picture(rows: Rows) -> bytes:
    """The time of a call over the number of rows: a panel for each op and model, a line for each way; as PNG.

    Cases with one number of rows are left out. Our lines are solid; a variant has the same colour in all panels.
    """
    from matplotlib.figure import Figure

    ops, models = (list(dict.fromkeys(row[name] for row in rows)) for name in ("op", "model"))
    lines: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {(op, one): {} for op in ops for one in models}
    for row in rows:
        if "cold" in row:
            points = lines[row["op"], row["model"]].setdefault(f"{row['variant']}, {row['weights']}", [])
            points.append((row["rows"], row["cold"]["median"] * 1e6))
    lines = {where: {way: found for way, found in own.items() if len(found) > 1} for where, own in lines.items()}
    lines = {where: own for where, own in lines.items() if own}
    ways = list(dict.fromkeys(way for own in lines.values() for way in own))
    down = max(1, -(-len(lines) // len(models)))
    figure = Figure(figsize=(3.2 * len(models), 2.6 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, len(models), squeeze=False).flat
    drawn = {}
    for axes, ((op, model), own) in zip(panels, lines.items(), strict=False):
        for way, points in own.items():
            style = "o-" if way.split(",")[0] in BACKENDS else "o--"
            (drawn[way],) = axes.plot(*zip(*points, strict=True), style, color=f"C{ways.index(way)}", markersize=3)
        axes.set(xlabel="rows", ylabel="µs", ylim=(0, None))
        axes.set_title(f"{op}, {model}", fontsize=9)
        axes.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=6, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()
