"""What the ways gave, as rows, a table and a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .processes import Worker
from .ways import OURS, Way

COLUMNS = ("tokens/s", "over ours, autoregressive, bf16", "same texts", "peak MiB", "load s")


@dataclass
class Measured:
    """A way, its process, and what each prompt gave."""

    way: Way
    worker: Worker
    tokens: list[int] = field(default_factory=list)  # after the first ones
    seconds: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    firsts: dict[int, list[float]] = field(default_factory=dict)  # by the prompt's length
    peak: float = 0.0  # MiB

    def take(self, answer: Mapping[str, Any]) -> None:
        """Note the answer to a prompt."""
        self.tokens.append(len(answer["tokens"]) - answer["first_tokens"])
        self.seconds.append(answer["seconds"])
        self.texts.append(answer["tokens"])
        self.peak = answer["peak_mib"]

    def take_first(self, length: int, answer: Mapping[str, Any]) -> None:
        """Note the time to the first token of a prompt."""
        self.firsts.setdefault(length, []).append(answer["first"])

    def row(self, ours: Measured) -> dict[str, Any]:
        """The figures, beside those of our autoregressive bf16 decoding."""
        pairs = zip(self.tokens, self.seconds, ours.tokens, ours.seconds, strict=True)
        ratios = [(mine / took) / (its / other) for mine, took, its, other in pairs if mine and its]
        seconds = sum(self.seconds)
        same = sum(mine == other for mine, other in zip(self.texts, ours.texts, strict=True))
        return {
            "engine": self.way.engine, "way": self.way.name, "weights": self.way.weights, "plain": self.way.plain,
            "version": self.worker.ready["version"], "load s": self.worker.ready["load"],
            "prompts": len(self.texts), "tokens/s": sum(self.tokens) / seconds if seconds else 0.0,
            COLUMNS[1]: statistics.median(ratios) if ratios else 0.0,
            "same texts": same / len(self.texts), "peak MiB": self.peak,
            "first token s": {str(length): statistics.median(seconds) for length, seconds in self.firsts.items()},
        }  # fmt: skip

    def samples(self) -> dict[str, Any]:
        """The raw figures."""
        return {"way": str(self.way), "tokens": self.tokens, "seconds": self.seconds, "first token s": self.firsts}


def is_ours(name: str) -> bool:
    """Whether a way of this name is this project's, if inside another engine."""
    return OURS in name


def markdown(task: str, rows: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> str:
    """A table, the fastest way first, and what is missing."""
    lengths = sorted({length for row in rows for length in row["first token s"]}, key=int)
    names = [task, "weights", *COLUMNS, *(f"first token of {length}, s" for length in lengths)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in sorted(rows, key=lambda one: -one["tokens/s"]):
        firsts = [f"{row['first token s'][length]:.3f}" if row["first token s"] else "" for length in lengths]
        cells = [f"{row['engine']}, {row['way']}", row["weights"], f"{row['tokens/s']:.0f}", f"{row[COLUMNS[1]]:.2f}×",
                 f"{row['same texts']:.0%}", f"{row['peak MiB']:.0f}", f"{row['load s']:.1f}", *firsts]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {way}: not measured, {reason}" for way, reason in skipped.items())])


def picture(tasks: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Tokens a second of every way, a panel a task, as PNG."""
    from matplotlib.figure import Figure

    height = max(len(task["rows"]) for task in tasks.values())
    figure = Figure(figsize=(6.5 * len(tasks), 0.3 * height + 1), layout="constrained")
    for axes, (name, task) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        rows = sorted(task["rows"], key=lambda row: row["tokens/s"])
        names = [f"{row['engine']}, {row['way']}, {row['weights']}" for row in rows]
        colours = ["tab:orange" if is_ours(name) else "tab:gray" for name in names]
        bars = axes.barh(names, [row["tokens/s"] for row in rows], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=2)
        axes.set(title=name, xlabel="tokens/s")
        axes.tick_params(axis="y", labelsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
