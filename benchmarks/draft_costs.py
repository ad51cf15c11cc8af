"""What a round costs with drafts of an exit of E layers and n draft layers, in passes of autoregressive decoding.

    python -m benchmarks.draft_costs [--exits 2,1,plain 2,1 1,1 1,2] [--speculations 1 2 3 4 6] [--threads 2]

The draft layers are copies of the model's layers: what a round costs does not depend on how good its drafts are. Each
round follows a pass of autoregressive decoding, which leaves the caches as decoding does, and is counted in that pass.
All exits and numbers of drafts take turns in a random order; medians count. "plain": draft layers in the model's
dtype, where `Exit.of` packs them in int8.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from layerskip import Exit
from layerskip._files import write_atomically
from layerskip.models import LayerSkipModel, adapt, gather_weights, load
from layerskip.models.weight_arena import gather_exit

from .harness import machine
from .tables import markdown_table

LOOKED_UP = "looked up"
Round = Callable[[int], Any]  # of K drafts


class Shape(NamedTuple):
    """An exit's layers and draft layers, and whether these stay in the model's dtype."""

    exit_layer: int
    num_draft_layers: int
    plain: bool

    @classmethod
    def of(cls, text: str) -> Shape:
        """Of ``E,n`` or ``E,n,plain``."""
        if not re.fullmatch(r"\d+,\d+(,plain)?", text):
            raise argparse.ArgumentTypeError(f"an exit is E,n or E,n,plain, got {text!r}")
        exit_layer, num_draft_layers, *rest = text.split(",")
        return cls(int(exit_layer), int(num_draft_layers), bool(rest))

    def __str__(self) -> str:
        return f"E={self.exit_layer}, n={self.num_draft_layers}{', plain' if self.plain else ''}"

    def on(self, model: LayerSkipModel, rows: int) -> LayerSkipModel:
        """The model with an exit whose head has this number of int8 rows."""
        draft_layers = [model.decoder.layer(self.exit_layer + number) for number in range(self.num_draft_layers)]
        sizes = model.num_layers, model.vocab_size
        exit_ = Exit(
            self.exit_layer, model.head.norm_weight, *sizes, draft_layers, torch.arange(min(rows, model.vocab_size))
        )
        bound = exit_.of(model)
        return model.with_exit(gather_exit(bound._replace(draft_layers=tuple(draft_layers)) if self.plain else bound))


def passes(args: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """By exit and number of drafts: how long each round took, in the passes before it."""
    hf_model, _ = load(args.model)
    gather_weights(hf_model)
    plain = adapt(hf_model)
    capacity = args.context + 2 * max(args.speculations)
    token, places = torch.tensor([100]), {"slots": torch.tensor([0])}
    prompt = torch.randint(plain.vocab_size, (1, args.context), generator=torch.Generator().manual_seed(0))

    def lengths() -> dict[str, torch.Tensor]:
        return {"seq_lens": torch.tensor([args.context]), **places}  # a round advances its own

    def rounds_of(shape: Shape) -> Round:
        model = shape.on(plain, args.draft_rows)
        cache = model.decoder.new_cache(1, capacity)
        model.prefill(prompt, cache, draft_layers=True)
        return lambda count: model.speculate(token, cache, shape.exit_layer, count, **lengths())

    cache = plain.decoder.new_cache(1, capacity)
    plain.prefill(prompt, cache)
    rounds: dict[str, Round] = {str(shape): rounds_of(shape) for shape in args.exits}
    rounds[LOOKED_UP] = lambda count: plain.head(plain.read(prompt[:, : count + 1], cache, **lengths()))
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in args.speculations} for name in rounds}
    turns = [(name, count) for name in rounds for count in args.speculations]
    order = random.Random(0)
    for repetition in range(args.repeat + 1):
        order.shuffle(turns)
        for name, count in turns:
            start = time.perf_counter()
            plain.decode(token, cache, plain.num_layers, **lengths())
            middle = time.perf_counter()
            rounds[name](count)
            if repetition:  # the first is to warm up
                found[name][count].append((time.perf_counter() - middle) / (middle - start))
    return found


def markdown(report: dict[str, Any]) -> str:
    """A table: a line for each exit, a column for each number of drafts."""
    counts = report["settings"]["speculations"]
    columns = ["passes a round of K drafts", *(f"K={count}" for count in counts)]
    rows = ([name, *(f"{costs[str(count)]:.2f}" for count in counts)] for name, costs in report["passes"].items())
    return markdown_table(columns, rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--exits", nargs="+", type=Shape.of, default=[*map(Shape.of, ("2,1,plain", "2,1", "1,2", "1,1"))]
    )
    parser.add_argument("--speculations", nargs="+", type=int, default=[1, 2, 3, 4, 6])
    parser.add_argument("--draft-rows", type=int, default=8192)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/draft_costs.json"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    found = passes(args)
    medians, quartiles = (
        {name: {str(count): of(all_) for count, all_ in costs.items()} for name, costs in found.items()}
        for of in (median, lambda all_: quantiles(all_)[::2])
    )
    settings = {**vars(args), "exits": [*map(str, args.exits)], "output": args.output.name}
    report = {"machine": machine(), "settings": settings, "passes": medians, "quartiles": quartiles}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(report, indent=1).encode())
    write_atomically(args.output.with_suffix(".md"), markdown(report).encode())
    print(markdown(report))


if __name__ == "__main__":
    main()
