"""Plots as SVG, whose colours are the page's, so that they are right in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, join, tag

WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 32, 46
SERIES = 8  # classes s0 … s7 of the style sheet: a colour, a dash and a marker each
_MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # a disc
    "M-4 -4h8v8h-8z",
    "M0 -5.5l5.2 9h-10.4z",
    "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "M0 5.5l5.2 -9h-10.4z",
    "M-5 -1.6h3.4v-3.4h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4z",  # a cross
    "M0 -5.4l5.1 3.7l-2 6h-6.2l-2 -6z",
    "M-4.8 -2.6l2.2 -2.2l2.6 2.6l2.6 -2.6l2.2 2.2l-2.6 2.6l2.6 2.6l-2.2 2.2l-2.6 -2.6l-2.6 2.6l-2.2 -2.2l2.6 -2.6z",
)


@dataclass(frozen=True)
class Axis:
    """A range of values from ``low`` to ``high``, and what stands at its ticks; by default round numbers in it."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: Sequence[float] = ()
    form: str = ""

    def told(self, value: float) -> str:
        """A value in few letters."""
        if self.form:
            return self.form.format(value)
        power = min(max(math.floor(math.log10(abs(value))) // 3, 0), 3) if abs(value) >= 1e4 else 0
        return f"{value / 1e3**power:g}{('', 'k', 'M', 'G')[power]}"

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at ``low`` to 1 at ``high``."""
        low, high, value = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return (value - low) / (high - low)

    def places(self) -> Sequence[float]:
        """The values of the ticks."""
        if self.ticks:
            return self.ticks
        if self.log:
            return _decades(self.low, self.high)
        step = _step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


class Chart:
    """A plot that grows with every mark.

    Parameters
    ----------
    title, remark : str
    x, y : Axis
    """

    def __init__(self, title: str, remark: str, x: Axis, y: Axis) -> None:
        self._title, self._remark, self._x, self._y = title, remark, x, y
        self._marks: list[Html] = []
        self._legend: list[tuple[int, str, str]] = []

    def line(self, points: Sequence[tuple[float, float]], series: int, name: str = "", form: str = "{:g}") -> None:
        """A line with a marker at each point."""
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in (self._at(*point) for point in points))
        self._marks.append(tag("path", d=f"M{path}", class_=f"line s{series}"))
        self.points(points, series, [f"{name}: {form.format(y)} at {x:g}" for x, y in points])
        self._legend += [(series, name, "line")] if name else []

    def points(
        self, points: Sequence[tuple[float, float]], series: int, tips: Sequence[str], class_: str = "", name: str = ""
    ) -> None:
        """Markers, each with a line about it."""
        for point, tip in zip(points, tips, strict=True):
            x, y = self._at(*point)
            mark = tag("path", tag("title", tip), d=_MARKERS[series], transform=f"translate({x:.1f} {y:.1f})",
                       class_=f"mark s{series} {class_}".strip())  # fmt: skip
            self._marks.append(mark)
        self._legend += [(series, name, "points")] if name else []

    def bar(self, left: float, right: float, value: float, series: int, tip: str) -> None:
        """A bar from the bottom up to ``value``."""
        (x, y), (end, bottom) = self._at(left, value), self._at(right, self._y.low)
        self._marks.append(
            tag("rect", tag("title", tip), x=f"{x:.1f}", y=f"{y:.1f}", width=f"{max(end - x, 1):.1f}",
                height=f"{max(bottom - y, 0.5):.1f}", class_=f"bar s{series}")
        )  # fmt: skip

    def level(self, value: float, series: int, name: str) -> None:
        """A line across the plot."""
        self.straight((self._x.low, value), (self._x.high, value), f"line level s{series}", f"{name}: {value:.4g}")
        self._legend.append((series, name, "level"))

    def straight(self, start: tuple[float, float], end: tuple[float, float], class_: str, tip: str) -> None:
        """A line from one point to another."""
        (x1, y1), (x2, y2) = self._at(*start), self._at(*end)
        self._marks.append(tag("path", tag("title", tip), d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=class_))

    def text(self, point: tuple[float, float], text: str) -> None:
        """A text to the right of a point."""
        left, top = self._at(*point)
        self._marks.append(tag("text", text, x=f"{left + 16:.1f}", y=f"{top + 3:.1f}", class_="note"))

    def legend(self, series: int, name: str, how: str) -> None:
        """Name a series: drawn as a "line", a "level", as "points" or as a "bar"."""
        self._legend.append((series, name, how))

    def figure(self) -> Html:
        """The plot with its title, remark and legend."""
        plot = tag("svg", self._frame(), *self._marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
                   aria_label=f"{self._title}. {self._remark}")  # fmt: skip
        named = tag("ul", *(tag("li", _swatch(series, how), name) for series, name, how in self._legend), class_="key")
        caption = tag("figcaption", tag("h4", self._title), tag("p", self._remark))
        return tag("figure", caption, plot, named if self._legend else "", class_="chart")

    def _at(self, x: float, y: float) -> tuple[float, float]:
        across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + across * self._x.share(x), HEIGHT - BOTTOM - up * self._y.share(y)

    def _frame(self) -> Html:
        """Grid, ticks and labels."""
        parts = []
        for value in self._y.places():
            _, y = self._at(self._x.low, value)
            parts.append(tag("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid"))
            parts.append(tag("text", self._y.told(value), x=LEFT - 7, y=f"{y + 4:.1f}", text_anchor="end"))
        for value in self._x.places():
            x, _ = self._at(value, self._y.low)
            parts.append(tag("text", self._x.told(value), x=f"{x:.1f}", y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
        parts.append(tag("path", d=f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis"))
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(tag("text", self._x.label, x=middle, y=HEIGHT - 8, text_anchor="middle", class_="name"))
        parts.append(tag("text", self._y.label, x=2, y=12, class_="name"))
        return join(parts)


def _swatch(series: int, how: str) -> Html:
    marker = tag("path", d=_MARKERS[series], transform="translate(14 7)", class_=f"mark s{series}")
    line = tag("path", d="M0 7H28", class_=f"line s{series}{' level' if how == 'level' else ''}")
    bar = tag("rect", x=7, y=0, width=14, height=14, class_=f"bar s{series}")
    shown = {"line": (line, marker), "level": (line,), "points": (marker,), "bar": (bar,)}[how]
    return tag("svg", *shown, viewBox="0 0 28 14", class_="swatch", aria_hidden="true")


def _step(least: float) -> float:
    """1, 2 or 5 times a power of ten, and not less than this."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _decades(low: float, high: float) -> list[float]:
    """Round numbers in a range of any width, few enough to stand side by side."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) <= 6:
            break
    return found
