"""Decoding with drafts from different sources, replayed: what a controller's choices give on texts that were recorded.

    python -m benchmarks.replay [--traces FILE] [--machine avx2 avx512] [--sources exit ngram auto]

A trace holds, for every position of a text that the model wrote, whether the exit's draft of the next token is right,
and what n-grams propose: how many tokens, after how long a match, and how many of them are right. From that follows
what any choice of drafts gives there. Only the seconds are assumed: those that a machine was measured to take. So a
replay takes a moment where decoding takes minutes, and gives the same every time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from layerskip.decoding.adaptive import CATCH_UP, Choice, Controller, Proposal, Sizes
from layerskip.decoding.draft_sources import NGRAM, NgramSource

TRACES = Path(__file__).parent / "traces" / "smollm2.json"
SOURCES = ("exit", "ngram", "auto")


class Match(NamedTuple):
    """A proposal: the length of the match, its tokens, and how many of them come true."""

    match: int
    length: int
    right: int


@dataclass(frozen=True)
class Trace:
    """A text of ``len(exit)`` tokens of some kind; entry p of both lists is about the tokens from p on."""

    kind: str
    exit: list[bool]
    matches: list[Match]

    @classmethod
    def of(cls, kind: str, prompt: Sequence[int], text: Sequence[int], exit: Sequence[bool]) -> Trace:
        """That of a text, of which ``exit`` says where an exit drafts the right token."""
        source, history, matches = NgramSource().new(), list(prompt), []
        for place, token in enumerate(text):
            found, rest = list(source.propose(history)), text[place:]
            right = next((i for i, pair in enumerate(zip(found, rest, strict=False)) if len(set(pair)) > 1), None)
            matches.append(Match(source.match, len(found), min(len(found), len(rest)) if right is None else right))
            history.append(token)
        return cls(kind, list(exit), matches)

    def packed(self) -> dict[str, str]:
        """As JSON takes it, in few characters."""
        matches = (":".join(map(str, match)) for match in self.matches)
        return {"kind": self.kind, "exit": "".join("01"[right] for right in self.exit), "matches": " ".join(matches)}

    @classmethod
    def unpacked(cls, packed: dict[str, str]) -> Trace:
        """What `packed` has made."""
        matches = [Match(*map(int, match.split(":"))) for match in packed["matches"].split()]
        return cls(packed["kind"], [flag == "1" for flag in packed["exit"]], matches)


@dataclass(frozen=True)
class Machine:
    """How long rounds take, in passes of one row through the whole model.

    ``rows``: the passes of 1, 2, … rows; interpolated linearly between and after them. The model's bytes
    are ``sizes``, those of an exit's draft layer ``draft_layer``.
    """

    rows: dict[int, float]
    sizes: Sizes
    draft_layer: int
    exit_layer: int = 2

    def passes(self, rows: int) -> float:
        """Passes of a verification of ``rows`` rows."""
        known = sorted(self.rows)
        low = max((one for one in known[:-1] if one <= rows), default=known[0])
        high = known[known.index(low) + 1]
        return self.rows[low] + (self.rows[high] - self.rows[low]) * (rows - low) / (high - low)

    def seconds(self, choice: Choice, missing: int = 0) -> float:
        """Of a round; before an exit drafts, its draft layers read the tokens that are ``missing``."""
        size = self.sizes
        model = size.num_layers * size.layer + size.head
        rows = self.passes(choice.num_speculations + 1)
        if not choice.exit_layer or not choice.num_speculations:
            return rows
        shallow = choice.exit_layer * size.layer
        drafts = choice.num_speculations * (shallow + size.draft_head) / model
        catch_up = self.passes(missing) * shallow / model + CATCH_UP if missing else 0.0
        return catch_up + drafts + (shallow + self.draft_layer) / model + rows * (model - shallow) / model


SMOLLM2 = Sizes(layer=7_080_192, head=56_623_104, draft_head=4_751_360 + 7_080_192, num_layers=30, num_draft_layers=1)
MACHINES = {
    "avx2": Machine({1: 1, 2: 1.10, 3: 1.64, 5: 2.05, 9: 2.81, 13: 3.98, 16: 4.69}, SMOLLM2, 7_080_192),
    "avx512": Machine({1: 1, 6: 1.25}, SMOLLM2, 7_080_192),
}


class Replayed(NamedTuple):
    """Tokens after the first of each text, the seconds that they took, and the choices of all rounds."""

    tokens: int
    seconds: float
    choices: list[Choice]

    @property
    def speed(self) -> float:
        """Against one token a pass."""
        return self.tokens / self.seconds


def replay(traces: Sequence[Trace], source: str, machine: Machine, controller: Controller | None = None) -> Replayed:
    """Texts one after the other, as one decoder would write them.

    Parameters
    ----------
    traces : sequence of Trace
    source : {"exit", "ngram", "auto"}
    machine : Machine
    controller : Controller, optional
        By default a new one, which knows nothing.
    """
    controller = Controller(machine.sizes, [machine.exit_layer]) if controller is None else controller
    total, seconds, choices = 0, 0.0, []
    for trace in traces:
        acceptance, place, seen, end = controller.new_acceptance(), 1, 1, len(trace.exit)
        while place < end:
            match, length, right = trace.matches[place]
            proposal = Proposal([0] * min(length, end - place - 1), NGRAM, match, True)
            acceptance.lag = place - seen
            if source == "exit":
                choice = controller.choose([acceptance])
            else:
                choice, _ = controller.choose_with_lookups([acceptance], [proposal], exits=source == "auto")
            layer, count = choice.exit_layer, min(choice.num_speculations, end - place - 1)
            missing = acceptance.lag if layer and count and machine.draft_layer else 0
            took = machine.seconds(Choice(layer, count), missing)
            if not missing:
                controller.observe_cost(Choice(layer, count), 1, took)
            accepted = min(right, count)
            if layer:
                flags = trace.exit[place : place + count]
                accepted = flags.index(False) if False in flags else count
                acceptance.observe(layer, accepted, count)
                seen = place + accepted + 1 if count else seen
            if source != "exit":
                told = [0] * min(right, accepted + 1) + [1] * (right <= accepted)
                acceptance.observe_proposal(proposal, told[: accepted + 1])
            place += accepted + 1
            total += accepted + 1
            seconds += took
            choices.append(Choice(layer, count))
    return Replayed(total, seconds, choices)


def read(path: Path = TRACES) -> dict[str, list[Trace]]:
    """Traces by their kind."""
    kinds: dict[str, list[Trace]] = {}
    for packed in json.loads(path.read_text())["traces"]:
        trace = Trace.unpacked(packed)
        kinds.setdefault(trace.kind, []).append(trace)
    return kinds


def table(kinds: dict[str, list[Trace]], machine: Machine, sources: Sequence[str]) -> list[dict[str, Any]]:
    """The speed of every source on every kind of text."""
    return [
        {"kind": kind, "tokens": sum(len(trace.exit) for trace in traces)}
        | {source: replay(traces, source, machine).speed for source in sources}
        for kind, traces in kinds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--machine", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    args = parser.parse_args(arguments)
    kinds = read(args.traces)
    for name in args.machine:
        for row in table(kinds, MACHINES[name], args.sources):
            cells = "  ".join(f"{source} {row[source]:.2f}×" for source in args.sources)
            print(f"{name:8} {row['kind']:16} {row['tokens']:6} tokens  {cells}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
