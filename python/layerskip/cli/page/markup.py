"""HTML and SVG, escaped by construction: what is not `Html` already is text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_VOID = frozenset({"meta", "input"})


class Html(str):
    """Markup. Any other string is text, and is escaped where it is put into markup."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. Of an attribute's name, ``_`` stands for ``-`` and one at the end goes; None leaves it out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{given}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[object], by: str = "") -> Html:
    """Markup and texts, one after the other."""
    return Html(by.join(child if isinstance(child, Html) else escape(str(child)) for child in children))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str) -> Html:
    """A table that scrolls in itself where it is too wide; its first column heads the rows."""
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    columns = tag("tr", *(tag("th", name, scope="col") for name in head))
    inner = tag("table", tag("thead", columns), tag("tbody", *body))
    scrolls = tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)
    return tag("section", tag("h4", caption), scrolls, class_="box")
