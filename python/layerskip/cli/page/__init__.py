"""A page of HTML that shows measurements: one file, that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import bench, exits
from .files import Measured, read
from .markup import Html, join, tag

__all__ = ["Measured", "page", "read"]

_STYLE = Path(__file__).parents[2] / "data" / "report.css"
_SECTIONS = {"bench": bench.section, "exits": exits.section}
# Nothing may be loaded, and no script runs, whatever a prompt holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(measured: Sequence[Measured]) -> str:
    """The page of some files, in their order."""
    titles = [_title(one) for one in measured]
    style = Html(_STYLE.read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"layerskip: {titles[0]}"),
        tag("style", style),
    )
    links = [
        tag("li", tag("a", title, href=f"#part-{number}"), f" ({one.name})")
        for number, (title, one) in enumerate(zip(titles, measured, strict=True))
    ]
    contents = tag("nav", tag("ul", *links), aria_label="contents") if len(links) > 1 else ""
    parts = [_part(number, one) for number, one in enumerate(measured)]
    heading = tag("header", tag("p", "layerskip report", class_="brand"), contents, class_="top")
    body = tag("body", heading, tag("main", *parts), tag("footer", _footer(measured)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _part(number: int, one: Measured) -> Html:
    content = _SECTIONS[one.kind](one.content, number)
    remark = tag("p", _remark(one), class_="remark")
    return tag("section", tag("h2", _title(one)), remark, content, id=f"part-{number}")


def _title(one: Measured) -> str:
    model = Path(one.content["settings"]["model"]).name or one.content["settings"]["model"]
    return f"{model}: {'decoding' if one.kind == 'bench' else 'its exits'}"


def _remark(one: Measured) -> str:
    """In which weights, where, and how drafts were made."""
    setting: dict[str, Any] = one.content["settings"]
    dtype, weights = setting["dtype"], setting.get("weights") or setting["dtype"]
    told = [dtype if weights == dtype else f"{weights} in {dtype}"]
    threads = setting.get("threads") if setting["device"] == "cpu" else None
    told.append(f"{threads} CPU thread{'s' * (threads != 1)}" if threads else setting["device"])
    if one.kind == "bench":
        told.append(f"E={setting.get('exit_layer')} of {setting.get('layers')}, K={setting.get('num_speculations')}")
        told.append(f"drafts from {setting['draft_source']}" if setting.get("draft_source", "exit") != "exit" else "")
        told.append(f"threshold {setting['draft_threshold']:g}" if setting.get("draft_threshold") else "")
    told.append(one.content.get("machine", {}).get("time", ""))
    return " · ".join(filter(None, [*told, one.name]))


def _footer(measured: Sequence[Measured]) -> Html:
    return join(["made by layerskip report of ", ", ".join(one.name for one in measured)])
