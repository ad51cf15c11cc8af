"""The part of the page that shows a file of `layerskip exits`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts
from .bench import settings
from .markup import Html, join, table, tag


def section(content: Mapping[str, Any], _: int) -> Html:
    """All of it."""
    exits, setting = content["exits"], content["settings"]
    layers, drafts = setting["layers"], setting["num_speculations"]
    figures = [charts.agreement(exits, layers), charts.bounds(exits, layers, drafts)]
    if content["reliability"]:
        figures.append(charts.reliability(content["reliability"]))
    best = max((one["bound"] for one in exits), default=0.0)
    rows = [
        [
            one["label"],
            f"{one['agreement']:.1%}",
            "–" if one["confidence"] is None else f"{one['confidence']:.1%}",
            "–" if one["error"] is None else f"{one['error']:.3f}",
            f"{one['tokens_per_round']:.2f}",
            tag("b", f"{one['bound']:.2f}×") if one["bound"] == best else f"{one['bound']:.2f}×",
        ]
        for one in exits
    ]
    head = ("exit layer", "agreement", "confidence", "calibration error", "tokens a round", "speedup at most")
    caption = f"every exit, {setting['positions']} tokens of {setting['prompts']}, K={drafts}"
    return join([charts.grid(figures), tag("h3", "Tables"), table(head, rows, caption), settings(content)])
