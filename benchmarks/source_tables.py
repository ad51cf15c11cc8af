"""The page of a run of `benchmarks.sources`; every figure comes from the run's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PLAIN = "autoregressive"
COLUMNS = (
    "task",
    "way",
    "tokens/s",
    "speedup",
    "median",
    "tokens a round",
    "accepted",
    "repeated 4-grams",
    "identical",
)
GOALS = {"HumanEval": 2.0, "rewriting code": 1.9, "chat": 1.4, "summaries": 1.4, "commands": 2.0}
"""The speedups that "auto" aims at, in greedy decoding."""
WAY = "auto"  # whose rounds the page describes
_SHAPES = {"tokens/s": "{:.0f}", "speedup": "{:.2f}×", "median": "{:.2f}×", "tokens a round": "{:.2f}",
           "repeated 4-grams": "{:.0%}"}  # fmt: skip
Rows = Sequence[Mapping[str, Any]]


def markdown(rows: Rows) -> str:
    """A line for each task and way."""
    return _table(COLUMNS, [[_cell(name, row[name]) for name in COLUMNS] for row in rows])


def page(report: Mapping[str, Any]) -> str:
    """Return the Markdown page of a run: speedups by task, then a row for each task and way."""
    parts = ["# Draft sources\n", f"{_head(report)}\n", markdown(report["rows"])]
    if WAY in report["settings"]["sources"]:
        parts.insert(2, _compared(report))
    return "\n".join(parts)


def _head(report: Mapping[str, Any]) -> str:
    where, given = report["machine"], report["settings"]
    options = [f"--exit {given['exit']}", f"--sources {' '.join(given['sources'])}", f"--limit {given['limit']}"]
    options += [f"--threads {given['threads']}"]
    options += [f"--temperature {given['temperature']}"] * bool(given["temperature"])
    options += ["--cpu-time"] * given["cpu_time"]
    plain = [row["tokens/s"] for row in report["rows"] if row["way"] == PLAIN]
    machine = f"{where['cpu']}, {where['isa']}, {where['threads']} threads"
    speed = f"autoregressive decoding {min(plain):.0f} to {max(plain):.0f} tokens/s"
    return (
        f"{machine}, {given['max_new_tokens']} new tokens, {speed} "
        f"(`python -m benchmarks.sources {' '.join(options)}`):"
    )


def _compared(report: Mapping[str, Any]) -> str:
    """A line for each task: the speedups of all ways, the fastest in bold, and what the rounds of one were like."""
    ways = report["settings"]["sources"]
    found = {(row["task"], row["way"]): row for row in report["rows"]}
    greedy = not report["settings"]["temperature"]
    names = ["task", *ways, f"{WAY}, tokens a round", f"{WAY}'s drafts accepted, by place in the round",
             "repeated 4-grams", *["goal"] * greedy]  # fmt: skip
    lines = []
    for task in dict.fromkeys(task for task, _ in found):
        speeds = [found[task, way]["speedup"] for way in ways]
        cells = [_cell("speedup", speed) for speed in speeds]
        cells = [f"**{cell}**" if speed == max(speeds) else cell for cell, speed in zip(cells, speeds, strict=True)]
        row = found[task, WAY]
        more = [_cell(name, row[name]) for name in ("tokens a round", "accepted", "repeated 4-grams")]
        reached = "met" if row["speedup"] >= GOALS[task] else "missed"
        lines.append([task, *cells, *more, *[f"{GOALS[task]:.1f}×, {reached}"] * greedy])
    return _table(names, lines)


def _cell(name: str, value: Any) -> str:
    return _SHAPES.get(name, "{}").format(value)


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"
