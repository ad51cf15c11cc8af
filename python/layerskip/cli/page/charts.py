"""The plots of what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from ..rendering import Drafts
from ..ways import AUTOREGRESSIVE, EARLY_EXIT_ASSISTED, SELF_SPECULATIVE, TRANSFORMERS
from .files import FIXED
from .markup import Html, join, tag
from .svg import SERIES, Axis, Chart

FEWEST = 5  # tokens, of which a share is shown
_OF_WAY = {AUTOREGRESSIVE: 6, SELF_SPECULATIVE: 0, TRANSFORMERS: 4, EARLY_EXIT_ASSISTED: 3}
_OF_SOURCE = {"exit": 0, "ngram": 1}


def acceptance(runs: Sequence[Mapping[str, Any]]) -> Html | None:
    """How often the first, the second, … draft of a round is right if those before it were, by source."""
    places = Drafts.sum(Drafts(**run["drafts"]) for run in runs if run.get("drafts")).by_position
    most = max(map(len, places.values()), default=0)
    if not most:
        return None
    remark = "of the rounds that came so far with right drafts, how many went on"
    chart = Chart("Acceptance by position", remark, _counted("place in the round's draft", most), _share("accepted"))
    width = 0.8 / len(places)
    for number, (source, counts) in enumerate(places.items()):
        series = _OF_SOURCE.get(source, 2)
        for place, (drafted, accepted) in enumerate(counts, start=1):
            left, rate = place - 0.4 + number * width, accepted / drafted if drafted else 0.0
            tip = f"{source}, place {place}: {accepted} of {drafted}, {rate:.0%}"
            chart.bar(left, left + width * 0.92, rate, series, tip)
        chart.legend(series, source, "bar")
    return chart.figure()


def tokens_a_round(runs: Iterable[Mapping[str, Any]]) -> Html | None:
    """How many rounds gave one token, two, …."""
    counts = Counter(one["emitted"] for run in runs for one in run.get("told", {}).get("rounds", ()))
    total = sum(counts.values())
    if not total:
        return None
    mean = sum(size * count for size, count in counts.items()) / total
    remark = f"{mean:.2f} on average, each from one pass through the later layers"
    highest = max(counts.values()) / total
    share = Axis("of the rounds", 0.0, min(1.0, highest * 1.1), form="{:.0%}")
    chart = Chart("Tokens a round", remark, _counted("tokens", max(counts)), share)
    for size, count in sorted(counts.items()):
        chart.bar(size - 0.4, size + 0.4, count / total, 0, f"{count} of {total} rounds gave {size} tokens")
    return chart.figure()


def _share(label: str) -> Axis:
    return Axis(label, 0.0, 1.0, ticks=(0, 0.2, 0.4, 0.6, 0.8, 1), form="{:.0%}")


def _counted(label: str, most: int) -> Axis:
    step = -(-most // 12)
    return Axis(label, 0.4, most + 0.6, ticks=tuple(range(1, most + 1, step)))


def roofline(content: Mapping[str, Any]) -> Html | None:
    """Speed against the bytes that a token costs to read, below the line that the memory's speed draws."""
    bandwidth = content["read_gigabytes_per_second"]
    points = {
        name: [(run["bytes_per_token"] / 1e6, run["tokens"] / run["seconds"]) for run in runs if _has_point(run)]
        for name, runs in content["runs"].items()
    }
    points = {name: known for name, known in points.items() if known}
    if not points or bandwidth <= 0:
        return None
    sizes, rates = zip(*(point for known in points.values() for point in known), strict=True)
    x = Axis("MB read a token", min(sizes) / 1.5, max(sizes) * 1.5, log=True)
    y = Axis("tokens/s", min(rates) / 1.6, max(*rates, bandwidth * 1e3 / min(sizes)) * 1.4, log=True)
    remark = f"the line is the memory's speed in the same run, {bandwidth:.1f} GB/s; each point is a prompt"
    if content["runs"].get(SELF_SPECULATIVE) and SELF_SPECULATIVE not in points:
        remark += "; what self-speculative rounds read changed from round to round"
    chart = Chart("Roofline", remark, x, y)
    _memory(chart, x, y, bandwidth)
    for name, known in points.items():
        tips = [
            f"{name}: {rate:.1f} tokens/s, {size:.0f} MB a token, {rate * size / 1e3:.1f} GB/s" for size, rate in known
        ]
        shares = [rate * size / 1e3 / bandwidth for size, rate in known]
        reached = f"{name}: {median(shares):.0%} of the memory's speed"
        chart.points(known, _OF_WAY.get(name, 7), tips, name=reached)
    return chart.figure()


def _has_point(run: Mapping[str, Any]) -> bool:
    return bool(run["bytes_per_token"] > 0 and run["tokens"] > 0)


def _memory(chart: Chart, x: Axis, y: Axis, bandwidth: float) -> None:
    """The line of `bandwidth` GB/s, as far as it lies within the axes."""
    left, right = max(x.low, bandwidth * 1e3 / y.high), min(x.high, bandwidth * 1e3 / y.low)
    chart.straight(
        (left, bandwidth * 1e3 / left), (right, bandwidth * 1e3 / right), "line roof", f"{bandwidth:.1f} GB/s"
    )
    chart.text((left, bandwidth * 1e3 / left), f"{bandwidth:.0f} GB/s")


def sweep(task: Mapping[str, Any]) -> Html:
    """Speed by E and K, beside what picks them, and the other sources."""
    fixed = of_fixed(task["fixed"])
    levels = {"autoregressive": task["autoregressive"], "auto": task["auto"]}
    levels |= {f"drafts from {name}": speed for name, speed in task["by_source"].items()}
    counts = sorted({count for row in fixed.values() for count in row})
    highest = max(*task["fixed"].values(), *levels.values()) * 1.06
    x = Axis("K, tokens drafted a round", 0, max(counts) + 1, ticks=counts)
    remark = "no draft threshold" if not task["draft_threshold"] else f"draft threshold {task['draft_threshold']:g}"
    chart = Chart(f"{task['task'] or 'all prompts'}: speed by E and K", remark, x, Axis("tokens/s", 0, highest))
    for series, (name, speed) in zip((6, 5, 4, 7), levels.items(), strict=False):
        chart.level(speed, series, name)
    for series, (exit_layer, row) in enumerate(fixed.items()):
        chart.line(sorted(row.items()), series % 4, f"E={exit_layer}", "{:.1f} tokens/s")
    return chart.figure()


def of_fixed(fixed: Mapping[str, float]) -> dict[int, dict[int, float]]:
    """The speeds of fixed choices, "E=4, K=8", by E and K."""
    found: dict[int, dict[int, float]] = {}
    for name, speed in fixed.items():
        exit_layer, count = map(int, FIXED.fullmatch(name).groups())  # type: ignore[union-attr]  # see `files`
        found.setdefault(exit_layer, {})[count] = speed
    return dict(sorted(found.items()))


def batches(measured: Sequence[Mapping[str, Any]]) -> Html:
    """Tokens a second of all sequences of a batch together, by its size."""
    sizes = [batch["size"] for batch in measured]
    highest = max(max(batch["tokens_per_second"].values()) for batch in measured)
    x = Axis("sequences", min(sizes) - 0.5, max(sizes) + 0.5, ticks=sizes)
    chart = Chart("Batches", "all sequences together, prompts included", x, Axis("tokens/s", 0, highest * 1.06))
    for name in measured[0]["tokens_per_second"]:
        points = [(batch["size"], batch["tokens_per_second"][name]) for batch in measured]
        chart.line(points, _OF_WAY.get(name, 7), name, "{:.1f} tokens/s")
    return chart.figure()


def agreement(exits: Sequence[Mapping[str, Any]], layers: int) -> Html:
    """By layer, how often the exit has the full depth's token, and how sure it is of it."""
    own = [(int(one["label"]), one) for one in exits if one["label"].isdigit()]
    remark = "on the text that the full depth writes"
    chart = Chart("Agreement of every exit", remark, Axis("exit layer", 0, layers), _share("of the tokens"))
    chart.line([(layer, one["agreement"]) for layer, one in own], 0, "agrees with the full depth", "{:.1%}")
    sure = [(layer, one["confidence"]) for layer, one in own if one["confidence"] is not None]
    chart.line(sure, 1, "mean confidence", "{:.1%}")
    for one in exits:
        if not one["label"].isdigit():
            chart.level(one["agreement"], 4 if one["label"] == "n-grams" else 3, one["label"])
    return chart.figure()


def bounds(exits: Sequence[Mapping[str, Any]], layers: int, drafts: int) -> Html:
    """By layer, the speedup that no decoder can exceed."""
    own = [(int(one["label"]), one["bound"]) for one in exits if one["label"].isdigit()]
    highest = max(one["bound"] for one in exits) * 1.1
    remark = f"tokens a round of {drafts} drafts over its cost in layers; heads are left out"
    axes = Axis("exit layer", 0, layers), Axis("speedup at most", 0, highest, form="{:g}×")
    chart = Chart("How much faster at most", remark, *axes)
    chart.level(1.0, 6, "autoregressive")
    chart.line(own, 0, "exit after this layer", "{:.2f}×")
    for one in exits:
        if not one["label"].isdigit():
            chart.level(one["bound"], 4 if one["label"] == "n-grams" else 3, one["label"])
    return chart.figure()


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Html:
    """Agreement by confidence: on the diagonal an exit is as often right as it says."""
    x, y = _share("confidence of the exit"), _share("agrees with the full depth")
    remark = f"on the grey line it is right as often as it says; points are of {FEWEST} tokens or more"
    chart = Chart("Can the confidence be trusted?", remark, x, y)
    chart.straight((0, 0), (1, 1), "line even", "as often right as it says")
    for series, (exit_layer, parts) in enumerate(bins.items()):
        points = [(one["confidence"], one["agreement"]) for one in parts if one["positions"] >= FEWEST]
        chart.line(points, series % SERIES, f"exit layer {exit_layer}", "{:.1%}")
    return chart.figure()


def bars(title: str, remark: str, values: Mapping[str, float], unit: str) -> Html:
    """Bars side by side, each with its name above and its value behind; they need no SVG."""
    highest = max(values.values())
    rows = []
    for name, value in values.items():
        bar = tag("span", class_=f"of s{_OF_WAY.get(name, 7)}", style=f"width:{value / highest:.1%}")
        rows.append(tag("li", tag("span", name), tag("b", f"{value:.1f} {unit}"), tag("span", bar, class_="track")))
    caption = tag("figcaption", tag("h4", title), tag("p", remark))
    return tag("figure", caption, tag("ul", *rows, class_="bars"), class_="chart")


def grid(figures: Iterable[Html | None]) -> Html:
    """Those plots that there are, side by side where there is room."""
    return tag("div", join(figure for figure in figures if figure is not None), class_="charts")
