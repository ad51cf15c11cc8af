"""How near "auto" comes to the best fixed exit layer and number of drafts, task by task."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from rich.table import Table
from torch import Tensor

from ..decoding import Choice, SelfSpeculativeDecoder
from . import options
from .measure import Stopwatch

DRAFTS = (1, 2, 4, 8)


@dataclass
class Sweep:
    """Tokens a second after the first token, of one task: of every fixed (E, K), of "auto", of the full model."""

    task: str
    fixed: dict[str, float]
    auto: float
    autoregressive: float

    @property
    def best(self) -> tuple[str, float]:
        """The fastest (E, K)."""
        return max(self.fixed.items(), key=lambda item: item[1])

    @property
    def worst(self) -> tuple[str, float]:
        """The slowest (E, K)."""
        return min(self.fixed.items(), key=lambda item: item[1])


def measure(model: Any, args: argparse.Namespace, encoded: Sequence[Tensor], tasks: Sequence[str]) -> Iterator[Sweep]:
    """Decode the prompts of each task every way, interleaved; "auto" starts each task with nothing learned.

    Each task's result comes as soon as it is there.
    """
    for task in dict.fromkeys(tasks):
        prompts = [ids for ids, own in zip(encoded, tasks, strict=True) if own == task]
        decoder = SelfSpeculativeDecoder(
            model, "auto", "auto", draft_head=options.draft_head(args), draft_threshold=args.draft_threshold
        )
        speeds = _speeds(decoder, prompts, args)
        auto, plain = speeds.pop("auto"), speeds.pop("autoregressive")
        yield Sweep(task, speeds, auto, plain)


def _speeds(decoder: SelfSpeculativeDecoder, prompts: Sequence[Tensor], args: argparse.Namespace) -> dict[str, float]:
    choices = [Choice(exit_layer, count) for exit_layer in decoder.controller.exits for count in DRAFTS]
    ways: dict[str, dict[str, Any]] = {"auto": {}, "autoregressive": {"strategy": "autoregressive"}}
    ways |= {f"E={one.exit_layer}, K={one.num_speculations}": one._asdict() for one in choices}
    rates = defaultdict(list)
    for ids in list(prompts) * args.repeats:
        for name, way in ways.items():
            watch = Stopwatch()
            decoder.generate(ids, args.max_new_tokens, streamer=watch, eos_token_id=[], **way)
            rates[name].append(watch.tokens / watch.seconds)
    return {name: mean(values) for name, values in rates.items()}


def sweep_table(sweeps: Sequence[Sweep]) -> Table:
    """A line for each task."""
    columns = ("task", "autoregressive", "auto", "best fixed", "auto / best", "worst fixed")
    table = Table(*columns, title="tokens/s of auto and of fixed choices", title_justify="left")
    for one in sweeps:
        (best, speed), (worst, slow) = one.best, one.worst
        cells = (f"{one.autoregressive:.1f}", f"{one.auto:.1f}", f"{speed:.1f} ({best})", f"{one.auto / speed:.2f}")
        table.add_row(one.task, *cells, f"{slow:.1f} ({worst})")
    return table
