"""A text in which each token shows where it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .markup import Html, join, tag

KINDS: Mapping[str, str] = {
    "exit": "drafted by the exit, accepted",
    "ngram": "looked up in the text so far, accepted",
    "other": "drafted by another source, accepted",
    "fix": "the model's own, in the place of a wrong draft",
    "own": "the model's own, after right drafts or none",
}
"""What a token can be -> in words."""


class Origin(NamedTuple):
    """A token's text, what it is, a line about it, and the text of the draft that it took the place of."""

    text: str
    kind: str
    tip: str
    rejected: str = ""


def origins(told: Mapping[str, Any]) -> Iterator[Origin]:
    """Those of the new tokens, of which there is one at least, in order."""
    pieces = iter(told["pieces"])
    yield Origin(next(pieces), "own", "the first token: the prompt gives it, before the first round")
    for number, one in enumerate(told["rounds"], start=1):
        drafts, accepted = one["drafts"], one["accepted"]
        kind = one["source"] if one["source"] in KINDS else "other"
        how = f"drafted after layer {one['exit_layer']}" if one["exit_layer"] else f"looked up by {one['source']}"
        for place in range(1, accepted + 1):
            tip = f"round {number}: {how}, token {place} of {len(drafts)}, accepted"
            yield Origin(next(pieces), kind, tip)
        if one["emitted"] == accepted:
            continue
        if accepted < len(drafts):
            tip = f"round {number}: the model's own, in the place of {_quoted(drafts[accepted])}, "
            tip += f"{how}, token {accepted + 1} of {len(drafts)}"
            yield Origin(next(pieces), "fix", tip, drafts[accepted])
        else:
            after = f"after {accepted} right draft{'s' * (accepted > 1)}" if drafts else "nothing was drafted"
            yield Origin(next(pieces), "own", f"round {number}: the model's own, {after}")


def coloured(told: Mapping[str, Any]) -> Html:
    """The text."""
    return tag("div", *map(_token, origins(told)), class_="text", translate="no", tabindex=0, role="group",
               aria_label="the new text")  # fmt: skip


def _token(origin: Origin) -> Html:
    shown = tag("span", visible(origin.text), class_=f"t {origin.kind}", data_tip=origin.tip, tabindex=-1)
    if not origin.rejected:
        return shown
    return join([tag("del", visible(origin.rejected), title="drafted, and not accepted"), shown])


def visible(text: str) -> Html:
    """A token's text, with a sign where a line ends, and one where a token has no text of its own."""
    if not text:
        return tag("i", class_="part")
    lines = text.split("\n")
    return join([line for one in lines for line in (one, tag("i", class_="end"), "\n")][:-2])


def legend(counts: Counter[str]) -> Html:
    """The kinds that occur, with their shares."""
    total = sum(counts.values())
    items = [
        tag("li", tag("span", "token", class_=f"t {kind}"), f" {words}: ", tag("b", f"{counts[kind] / total:.0%}"))
        for kind, words in KINDS.items()
        if counts[kind]
    ]
    return tag("ul", *items, class_="legend")


def shares(counts: Counter[str]) -> Html:
    """A bar of as many parts as there are kinds."""
    parts = [
        tag("span", class_=kind, style=f"flex-grow:{counts[kind]}", title=f"{words}: {counts[kind]}")
        for kind, words in KINDS.items()
        if counts[kind]
    ]
    return tag("div", *parts, class_="shares", aria_hidden="true")


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Html:
    """A line for each round: who drafted what, and how much of it was right."""
    rows = []
    for number, one in enumerate(rounds, start=1):
        right, wrong = one["drafts"][: one["accepted"]], one["drafts"][one["accepted"] :]
        cells: tuple[object, ...] = (number, "nothing drafted", "", "")
        if one["drafts"]:
            source = f"{one['source']}, layer {one['exit_layer']}" if one["exit_layer"] else one["source"]
            drafts = tag(
                "span", *map(visible, right), tag("del", *map(visible, wrong)), class_="drafts", translate="no"
            )
            cells = (number, source, f"{len(right)}/{len(one['drafts'])}", drafts)
        rows.append(tag("tr", *(tag("td", cell) for cell in cells)))
    head = tag("tr", *(tag("th", name, scope="col") for name in ("round", "source", "right", "drafts")))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll", tabindex=0)


def _quoted(text: str) -> str:
    return f"“{text}”".replace("\n", "↵")
