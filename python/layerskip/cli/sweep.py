"""How near "auto" comes to the best fixed exit layer and number of drafts, what other sources and a threshold give."""

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
from ..decoding.source import AUTO, NGRAM
from . import options
from .measure import Stopwatch

DRAFTS = (1, 2, 4, 8, 12)
OTHERS = (NGRAM, AUTO)  # sources that are compared with exits
THRESHOLD = 0.5  # what is compared with none, unless --draft-threshold says another


@dataclass
class Sweep:
    """Tokens a second after the first token, of one task: of every fixed (E, K), of "auto", of the full model.

    ``by_source`` has those of the other draft sources. Drafts of exits end at tokens less probable than
    ``draft_threshold``.
    """

    task: str
    draft_threshold: float
    fixed: dict[str, float]
    auto: float
    autoregressive: float
    by_source: dict[str, float]

    @property
    def best(self) -> tuple[str, float]:
        """The fastest (E, K)."""
        return max(self.fixed.items(), key=lambda item: item[1])

    @property
    def worst(self) -> tuple[str, float]:
        """The slowest (E, K)."""
        return min(self.fixed.items(), key=lambda item: item[1])


def measure(model: Any, args: argparse.Namespace, encoded: Sequence[Tensor], tasks: Sequence[str]) -> Iterator[Sweep]:
    """Decode the prompts of each task every way, without a draft threshold and with one, all interleaved.

    "auto" starts each task and threshold with nothing learned. A task's two results come as soon as they are there.
    """
    thresholds = (0.0, args.draft_threshold or THRESHOLD)
    for task in dict.fromkeys(tasks):
        prompts = [ids for ids, own in zip(encoded, tasks, strict=True) if own == task]
        decoders = [
            SelfSpeculativeDecoder(
                model, "auto", "auto", draft_head=options.draft_head(args), draft_threshold=threshold, exit=args.exit
            )
            for threshold in thresholds
        ]
        for decoder, speeds in zip(decoders, _speeds(decoders, prompts, args), strict=True):
            auto, plain = speeds.pop("auto"), speeds.pop("autoregressive")
            by_source = {source: speeds.pop(f"source {source}") for source in OTHERS}
            yield Sweep(task, decoder.draft_threshold, speeds, auto, plain, by_source)


def _speeds(
    decoders: Sequence[SelfSpeculativeDecoder], prompts: Sequence[Tensor], args: argparse.Namespace
) -> list[dict[str, float]]:
    """For each decoder the mean tokens a second of each way."""
    choices = [Choice(exit_layer, count) for exit_layer in decoders[0].controller.exits for count in DRAFTS]
    ways: dict[str, dict[str, Any]] = {"auto": {}, "autoregressive": {"strategy": "autoregressive"}}
    ways |= {f"source {source}": {"draft_source": source} for source in OTHERS}
    ways |= {f"E={one.exit_layer}, K={one.num_speculations}": one._asdict() for one in choices}
    rates: list[dict[str, list[float]]] = [defaultdict(list) for _ in decoders]
    for ids in list(prompts) * args.repeats:
        for name, way in ways.items():
            for decoder, own in zip(decoders, rates, strict=True):
                watch = Stopwatch()
                decoder.generate(ids, args.max_new_tokens, streamer=watch, eos_token_id=[], **way)
                own[name].append(watch.tokens / watch.seconds)
    return [{name: mean(values) for name, values in own.items()} for own in rates]


def sweep_table(sweeps: Sequence[Sweep]) -> Table:
    """A line for each task and threshold."""
    table = Table(title="tokens/s of auto and of fixed choices, by draft threshold", title_justify="left")
    columns = ("task", "threshold", "autoregressive", "auto", "best fixed", "auto / best", "worst fixed")
    for column in (*columns, *(f"source {name}" for name in OTHERS)):
        table.add_column(column, no_wrap=column in ("task", "auto / best"))
    for one in sweeps:
        (best, speed), (worst, slow) = one.best, one.worst
        cells = (f"{one.autoregressive:.1f}", f"{one.auto:.1f}", f"{speed:.1f} ({best})", f"{one.auto / speed:.2f}")
        others = (f"{one.by_source[name]:.1f}" for name in OTHERS)
        table.add_row(one.task, f"{one.draft_threshold:g}", *cells, f"{slow:.1f} ({worst})", *others)
    return table
