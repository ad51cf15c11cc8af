"""What the ways gave, as rows, a table and a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..tables import ABSENT, markdown_table
from .methods import OURS, Method, Worker

COLUMNS = ("tokens/s", "over ours, autoregressive, bf16", "same texts", "peak MiB", "load s")


@dataclass
class Measured:
    """A way, its process, and what each prompt gave."""

    way: Method
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
    """A table, fastest method first, and the methods that are missing."""
    lengths = sorted({length for row in rows for length in row["first token s"]}, key=int)
    names = [task, "weights", *COLUMNS, *(f"first token of {length}, s" for length in lengths)]
    lines = []
    for row in sorted(rows, key=lambda one: -one["tokens/s"]):
        firsts = [f"{row['first token s'][length]:.3f}" if row["first token s"] else "" for length in lengths]
        cells = [f"{row['engine']}, {row['way']}", row["weights"], f"{row['tokens/s']:.0f}", f"{row[COLUMNS[1]]:.2f}×",
                 f"{row['same texts']:.0%}", f"{row['peak MiB']:.0f}", f"{row['load s']:.1f}", *firsts]  # fmt: skip
        lines.append(cells)
    missing = (f"- {way}: not measured, {reason}" for way, reason in skipped.items())
    return "\n".join([markdown_table(names, lines), "", *missing])


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


BITS = {"bf16": 16, "f16": 16, "int8": 8, "q8_0": 8, "int4": 4, "q4_0": 4, "q4_1": 4}
SPEED, RATIO, _, PEAK, LOAD = COLUMNS
Row = Mapping[str, Any]
Key = tuple[str, str, str]  # engine, way, weights


HEAD = """# Beside other engines

The same weights in every engine, greedy. Each way of decoding has its own process; they take turns in shuffled
order. In brackets is the median over the prompts of the ratio to our autoregressive bf16 decoding; the fastest of
a task is bold. Memory, loading and the time to the first token are the first task's."""


def page(report: Mapping[str, Any], name: str) -> str:
    """Return the Markdown page of a run whose figures are in ``name``.json and whose picture is ``name``.png."""
    tasks = report["tasks"]
    best = "## The best of ours beside the best of the others\n\nBold where we lose."
    parts = [
        HEAD,
        _head(report),
        _table(tasks),
        *_missing(tasks),
        best,
        _beside(tasks),
        f"![Tokens a second]({name}.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _head(report: Mapping[str, Any]) -> str:
    where, settings = report["machine"], report["settings"]
    versions = dict.fromkeys(f"{row['engine']} {row['version']}" for row in _rows(report["tasks"]))
    first = " ".join(map(str, settings["first_token"]))
    command = (
        f"python -m benchmarks.peers --limit {settings['limit']} --max-new-tokens {settings['max_new_tokens']} "
        f"--first-token {first} --repeat {settings['repeat']}"
    )
    return f"{where['cpu']}, {where['isa']}, {where['threads']} threads; {', '.join(versions)} (`{command}`):"


def _rows(tasks: Mapping[str, Any]) -> Iterator[Row]:
    return (row for task in tasks.values() for row in task["rows"])


def _key(row: Row) -> Key:
    return row["engine"], row["way"], row["weights"]


def _name(row: Row) -> str:
    return ", ".join(_key(row))


def _table(tasks: Mapping[str, Any]) -> str:
    """A line for each way, ours first, then by engine, the fastest first; memory and times are the first task's."""
    by_task = [{_key(row): row for row in task["rows"]} for task in tasks.values()]
    fastest = [max(row[SPEED] for row in found.values()) for found in by_task]
    keys = sorted(dict.fromkeys(map(_key, _rows(tasks))), key=lambda key: -_most(by_task, key))
    engines = sorted(dict.fromkeys(key[0] for key in keys), key=lambda engine: engine != OURS)
    lengths = _lengths(by_task[0].values())
    names = ["", "weights", *(f"{task}, {SPEED}" for task in tasks), PEAK, "load, s",
             *(f"first token of {length}, s" for length in lengths)]  # fmt: skip
    lines = []
    for key in sorted(keys, key=lambda key: engines.index(key[0])):
        speeds = (_speed(found.get(key), most) for found, most in zip(by_task, fastest, strict=True))
        row = by_task[0].get(key)
        once = [ABSENT] * 2 if row is None else [f"{row[PEAK]:.0f}", f"{row[LOAD]:.1f}"]
        firsts = {} if row is None else row["first token s"]
        times = (f"{firsts[length]:.3f}" if length in firsts else "" for length in lengths)
        lines.append([", ".join(key[:2]), key[2], *speeds, *once, *times])
    return markdown_table(names, lines)


def _most(by_task: Sequence[Mapping[Key, Row]], key: Key) -> float:
    return max(found[key][SPEED] for found in by_task if key in found)


def _speed(row: Row | None, most: float) -> str:
    if row is None:
        return ABSENT
    text = f"{row[SPEED]:.0f} ({row[RATIO]:.2f}×)"
    return f"**{text}**" if row[SPEED] == most else text


def _lengths(rows: Iterable[Row]) -> list[str]:
    return sorted({length for row in rows for length in row["first token s"]}, key=int)


def _missing(tasks: Mapping[str, Any]) -> Iterator[str]:
    """List the methods that were not measured, and why."""
    reasons = [f"- {task}, {way}: {why}" for task, found in tasks.items() for way, why in found["skipped"].items()]
    if reasons:
        yield "Not measured:\n\n" + "\n".join(reasons)


class Pair(NamedTuple):
    """The best of ours and of the others: their names and figures, and by how much ours is better."""

    what: str
    task: str
    ours: tuple[str, float]
    other: tuple[str, float]
    ratio: float


def pairs(tasks: Mapping[str, Any]) -> Iterator[Pair]:
    """The fastest engine for each goal; memory and times of the first task."""
    for task, found in tasks.items():
        for bits in (16, 8, 4):
            plain = [row for row in found["rows"] if row["plain"] and BITS[row["weights"]] == bits]
            yield from _best(f"{SPEED}, without drafts, {bits} bits", task, {_name(row): row[SPEED] for row in plain})
        yield from _best(f"{SPEED}, whatever is fastest", task, {_name(row): row[SPEED] for row in found["rows"]})
    task, rows = next((task, found["rows"]) for task, found in tasks.items())
    for length in _lengths(rows):
        firsts = {_name(row): row["first token s"].get(length) for row in rows}
        times = {name: time for name, time in firsts.items() if time is not None}
        yield from _best(f"first token of {length}, s", task, times, least=True)
    for what in (PEAK, LOAD):
        yield from _best(what, task, {_name(row): row[what] for row in rows}, least=True)


def _best(what: str, task: str, figures: Mapping[str, float], least: bool = False) -> Iterator[Pair]:
    """None where only one side has figures."""
    ours, others = ([one for one in figures.items() if is_ours(one[0]) == own] for own in (True, False))
    if ours and others:
        best = min if least else max
        (own, mine), (other, theirs) = (best(side, key=lambda one: one[1]) for side in (ours, others))
        yield Pair(what, task, (own, mine), (other, theirs), theirs / mine if least else mine / theirs)


def _beside(tasks: Mapping[str, Any]) -> str:
    """Bold where we lose."""
    lines = []
    for one in pairs(tasks):
        factor = f"{one.ratio:.2f}×"
        sides = (f"{figure:.{_places(figure)}f} ({name})" for name, figure in (one.ours, one.other))
        lines.append([one.what, one.task, *sides, factor if one.ratio >= 1 else f"**{factor}**"])
    return markdown_table(("figure", "task", "ours", "the others", "ours is better"), lines)


def _places(figure: float) -> int:
    """Of a figure with three digits or more."""
    return 0 if figure >= 100 else 1 if figure >= 10 else 3
