"""Render results: tables, decode traces as text, draft counts, and plots: PNG, or SVG for `layerskip report`."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .._imports import need, printable

if TYPE_CHECKING:
    from torch import Tensor

    from ..decoding import RoundRecord, Stats

# The names of decoding methods in reports.
AUTOREGRESSIVE = "autoregressive"
SELF_SPECULATIVE = "self-speculative"
TRANSFORMERS = "transformers"
EARLY_EXIT_ASSISTED = "transformers, early exit"
ACCEPTED = "bold green"  # the style of draft tokens that were accepted


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], unwrapped: Sequence[str] = (), **style: Any
) -> Table:
    """A table of ``rows`` with a title on the left; columns in ``unwrapped`` keep each cell on one line.

    In a narrow terminal the other columns break lines, so that no digit is lost.
    """
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, no_wrap=column in unwrapped, overflow="fold", **style)
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


class TextPrinter:
    """Streamer that prints the text of a sequence, up to a stop string, and a line end after it.

    On a terminal, control characters are escaped, and `push` colors accepted draft tokens. ``text`` is the text printed
    so far.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), console: Console | None = None) -> None:
        from ..decoding.detokenizer import SequenceText

        self._text = SequenceText(tokenizer, stop_strings)
        self._console = Console() if console is None else console
        self._started = False
        self.text = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, N] first, then new tokens [n]."""
        tokens = value.reshape(-1).tolist()
        if self._started:
            self._print("".join(map(self._text.push, tokens)))
        else:
            self.start_after(tokens)

    def start_after(self, prompt_tokens: Sequence[int]) -> None:
        self._text.start_after(prompt_tokens)
        self._started = True

    def push(self, token: int, drafted: bool = False) -> None:
        """Take a new token; ``drafted`` if it is an accepted draft token."""
        self._print(self._text.push(token), ACCEPTED if drafted else None)

    def end(self) -> None:
        self._print(self._text.finish() + "\n")

    def _print(self, text: str, style: str | None = None) -> None:
        self.text += text
        shown = printable(text) if sys.stdout.isatty() else text
        self._console.out(shown, style=style, end="", highlight=False)


def stats_line(stats: Stats) -> str:
    """Tokens, times and accepted drafts of one sequence."""
    line = (
        f"{stats.new_tokens} tokens in {stats.seconds:.2f} s, first after {stats.time_to_first_token * 1e3:.0f} ms, "
        f"then {stats.decode_tokens_per_second:.1f} tokens/s"
    )
    if stats.drafted:
        line += f"; {stats.rounds} rounds, {stats.accepted} of {stats.drafted} drafts accepted"
        line += f" ({stats.acceptance_rate:.0%})"
    if len(stats.by_source) > 1:
        line += f": {Drafts.of(stats)}"
    return line


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


Axes = Any  # of matplotlib, which is imported when something is drawn
DATA = Path(__file__).parents[1] / "data"
_COLORS = {AUTOREGRESSIVE: "C6", SELF_SPECULATIVE: "C0", TRANSFORMERS: "C4", EARLY_EXIT_ASSISTED: "C3", "exit": "C0"}


@contextmanager
def panels(count: int = 1, size: tuple[float, float] = (5.8, 3.3)) -> Iterator[Iterator[Axes]]:
    """In the style of all plots: axes side by side in a figure of `size` inches, then those of the next figure."""
    with need("matplotlib", "a picture").rc_context(fname=DATA / "plots.mplstyle"):
        from matplotlib.figure import Figure

        figures = iter(lambda: Figure(figsize=size, layout="constrained"), None)
        yield (axes for figure in figures for axes in figure.subplots(1, count, squeeze=False)[0])


def saved(axes: Axes, **how: Any) -> bytes:
    """The figure of `axes`, with legends below its plots, as PNG or as `how` tells `savefig`."""
    figure, height, rows = axes.figure, axes.figure.get_figheight(), [0]
    for one in figure.axes:
        if names := one.get_legend_handles_labels()[1]:
            columns = max(1, 52 // (6 + max(map(len, names))))
            one.legend(loc="upper left", bbox_to_anchor=(0, -0.56 / (height - 0.9)), ncols=columns)
            rows.append(-(-len(names) // columns))
    figure.set_figheight(height + 0.25 * max(rows))
    figure.savefig(buffer := io.BytesIO(), **{"dpi": 150, **how})
    return buffer.getvalue()


def svg(axes: Axes, prefix: str) -> str:
    """Inline SVG with tooltips, in the variables of report.css as colors; its ids begin with `prefix`."""
    x, y = (axis.get_major_formatter() for axis in (axes.xaxis, axes.yaxis))
    for bars in axes.containers:
        for bar in bars:
            value = y(bar.get_height()) if bars.orientation == "vertical" else x(bar.get_width())
            bar.set_gid(f"tip:{bars.get_label().removeprefix('_')}: {value}")
    for line in axes.lines[:]:
        line.set_gid(f"tip:{line.get_label()}")
        for point in line.get_xydata() if line.get_marker() != "None" else ():
            tip = f"tip:{line.get_label()}: {y(point[1])} at {x(point[0])}"
            axes.plot(*point, color=line.get_color(), marker=line.get_marker(), linestyle="none", gid=tip)
    text = saved(axes, format="svg", transparent=True).decode()
    unneeded = r'<(style|metadata).*?</\1>|<!--.*?-->| (xmlns(:\w+)?|clip-path)="[^"]*"'
    text = re.sub(unneeded, "", text[text.index("<svg") :], flags=re.S).replace(" xlink:href=", " href=")
    text = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", text)
    text = re.sub(r'( id="|href="#)', rf"\g<1>{prefix}", text)
    for name, color in re.findall(r"--(\w+): (#\w{6})", (DATA / "report.css").read_text().partition("@media")[0]):
        text = text.replace(color, f"var(--{name})")
    return text


def labelled(axes: Axes, x: str, y: str, percent: str = "", top: float | None = None) -> Axes:
    """The axes with labels and round ticks, up to `top`; `percent` names those ("x", "y") of shares."""
    from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

    axes.set(xlabel=x, title=y)
    axes.minorticks_off()
    if axes.get_yscale() == "linear":
        axes.set_ylim(0, top)
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and high > 6 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        elif name not in percent:
            axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=name == "x", min_n_ticks=1))
        axis.set_major_formatter(PercentFormatter(1, 0) if name in percent else lambda value, _=0: f"{value:,.6g}")
    return axes


def speeds(axes: Axes, names: Sequence[str], rates: Mapping[str, Sequence[float]]) -> Axes:
    """Bars of tokens/s: a group for each of `names`, a bar in it for each way of decoding."""
    for number, (way, values) in enumerate(rates.items()):
        places = np.arange(len(names)) + (number + 0.5) * 0.8 / len(rates) - 0.4
        bars = axes.barh(places, values, 0.72 / len(rates), color=_COLORS.get(way, "C7"), label=way)
        axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set(xlabel="tokens/s, after the first token", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.16)
    axes.grid(visible=False)
    return axes


def of_bench(content: Mapping[str, Any], panels: Iterator[Axes]) -> Iterator[tuple[str, str, Axes]]:
    """Title, remark and axes of each plot of a file of `layerskip bench`; the first is that of speeds."""
    runs, bandwidth, batches = content["runs"], content["read_gigabytes_per_second"], content["throughput"]
    ours = runs.get(SELF_SPECULATIVE, [])
    if summary := {name: one for name, one in content["summary"].items() if one}:
        axes = speeds(next(panels), [""], {name: [one["tokens_per_second"]] for name, one in summary.items()})
        if size := summary.get(AUTOREGRESSIVE, {}).get("megabytes_per_token"):
            limit = f"autoregressive at {bandwidth:.0f} GB/s: {bandwidth * 1e3 / size:.1f}"
            axes.axvline(bandwidth * 1e3 / size, color="C1", linestyle="--", label=limit)
        yield "Speed", "median over the prompts", axes
    places = Drafts.sum(Drafts(**run["drafts"]) for run in ours if run.get("drafts")).by_position
    if any(places.values()):
        axes, width = next(panels), 0.8 / len(places)
        for number, (source, pairs) in enumerate(places.items()):
            x = [place + 0.6 + (number + 0.5) * width for place in range(len(pairs))]
            name = f"drafts from {source}: {sum(two for _, two in pairs)} of {sum(one for one, _ in pairs)}"
            color = {"exit": "C0", "ngram": "C1"}.get(source, "C2")
            axes.bar(x, [two / max(one, 1) for one, two in pairs], 0.94 * width, color=color, label=name)
        remark = "where all earlier tokens of the draft were accepted"
        yield "Acceptance by position", remark, labelled(axes, "position in the draft", "acceptance rate", "y", 1)
    sizes = Counter(one["emitted"] for run in ours for one in run["told"]["rounds"])
    if sizes:
        mean, shares = sum(sizes.elements()) / sizes.total(), [count / sizes.total() for count in sizes.values()]
        (axes := next(panels)).bar(list(sizes), shares, label="_rounds")
        remark = f"{mean:.2f} on average, each from one pass through the later layers"
        yield "Tokens per round", remark, labelled(axes, "tokens", "share of the rounds", "y")
    reads = {name: [(run["bytes_per_token"] / 1e6, run["tokens"] / run["seconds"]) for run in own
             if run["bytes_per_token"] > 0 and run["tokens"] > 0] for name, own in runs.items()}  # fmt: skip
    if any(reads.values()) and bandwidth > 0:
        axes = next(panels)
        for name, (size, rate) in ((name, np.array(points).T) for name, points in reads.items() if points):
            share = f"{name}: {np.median(size * rate) / 1e3 / bandwidth:.0%} of the memory's speed"
            axes.loglog(size, rate, linestyle="none", color=_COLORS.get(name, "C7"), label=share)
        ends = np.multiply(axes.dataLim.intervalx, (0.7, 1.4))
        axes.plot(ends, bandwidth * 1e3 / ends, "--", marker="None", color="C1", label=f"memory, {bandwidth:.1f} GB/s")
        remark = "each point is a prompt; ways whose bytes per token change from round to round are left out"
        yield "Roofline", remark, labelled(axes, "MB read per token", "tokens/s")
    if batches:
        axes = next(panels)
        for name in batches[0]["tokens_per_second"]:
            rates = [batch["tokens_per_second"][name] for batch in batches]
            axes.plot([batch["size"] for batch in batches], rates, color=_COLORS.get(name, "C7"), label=name)
        yield "Batches", "all sequences together, prompts included", labelled(axes, "sequences", "tokens/s")
    for task in content["sweep"]:
        axes, levels = next(panels), {"autoregressive": task["autoregressive"], "auto": task["auto"]}
        levels |= {f"drafts from {name}": rate for name, rate in task["by_source"].items()}
        for number, (name, rate) in enumerate(levels.items(), start=4):
            axes.axhline(rate, color=f"C{number}", linestyle="--", label=f"{name}: {rate:.1f}")
        for exit_layer, row in sorted(task["grid"].items()):
            axes.plot(*zip(*sorted(row.items()), strict=True), label=f"E={exit_layer}")
        threshold = f"draft threshold {task['draft_threshold']:g}" if task["draft_threshold"] else "no draft threshold"
        title = f"{task['task'] or 'all prompts'}: speed by E and K"
        yield title, threshold, labelled(axes, "K, draft tokens per round", "tokens/s")


def of_exits(content: Mapping[str, Any], panels: Iterator[Axes]) -> Iterator[tuple[str, str, Axes]]:
    """Title, remark and axes of each plot of a file of `layerskip exits`."""
    own = [one for one in content["exits"] if one["label"].isdigit()]
    others = [one for one in content["exits"] if not one["label"].isdigit()]
    for title, remark, y, *keys in (
        ("Agreement of every exit", "with the full depth, on its text", "share of tokens", "agreement", "confidence"),
        ("Speedup at most", "tokens per round over its cost in layers, without heads", "speedup", "bound"),
    ):
        axes = next(panels)
        for key in keys:
            axes.plot([int(one["label"]) for one in own], [one.get(key) for one in own], label=f"exits: {key}")
        if "bound" in keys:
            axes.axhline(1, color="C6", label="autoregressive")
        for number, one in enumerate(others, start=3):
            axes.axhline(one[keys[0]], color=f"C{number}", linestyle="--", label=one["label"])
        yield title, remark, labelled(axes, "exit layer", y, *(("y", 1) if y == "share of tokens" else ()))
    if content["reliability"]:
        (axes := next(panels)).plot([0, 1], [0, 1], "-", marker="None", color="C6", label="right as often as it says")
        for exit_layer, parts in content["reliability"].items():
            points = [(one["confidence"], one["agreement"]) for one in parts if one["positions"] >= 5]
            axes.plot(*np.array(points).reshape(-1, 2).T, label=f"exit layer {exit_layer}")
        axes = labelled(axes, "confidence of the exit", "agreement with the full depth", "xy", 1)
        yield "Can the confidence be trusted?", "points are of 5 tokens or more", axes
