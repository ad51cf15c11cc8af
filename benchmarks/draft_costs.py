"""What a round costs with drafts of an exit of E layers and n blocks, in passes of autoregressive decoding.

    python -m benchmarks.draft_costs [--exits 2,1,plain 2,1 1,1 1,2] [--speculations 1 2 3 4 6] [--threads 2]

The blocks are copies of the model's layers: what a round costs does not depend on how good its drafts are. Each round
follows a pass of autoregressive decoding, which leaves the caches as decoding does, and counts in that pass's seconds.
All exits and numbers of drafts take turns in a random order; medians count. "plain": blocks in the model's dtype, as
`Exit` kept them before they were packed in int8 beside a head in int8.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from layerskip import Exit
from layerskip._files import write_atomically
from layerskip.models import LayerSkipModel, adapt, gather_weights, load
from layerskip.models.arena import gather_exit

from .harness import machine

LOOKED_UP = "looked up"
Round = Callable[[int], Any]  # of K drafts


class Shape(NamedTuple):
    """An exit's layers and blocks, and whether these stay in the model's dtype."""

    exit_layer: int
    num_blocks: int
    plain: bool

    @classmethod
    def of(cls, text: str) -> Shape:
        """Of ``E,n`` or ``E,n,plain``."""
        exit_layer, num_blocks, *rest = text.split(",")
        if rest not in ([], ["plain"]):
            raise argparse.ArgumentTypeError(f"an exit is E,n or E,n,plain, got {text!r}")
        return cls(int(exit_layer), int(num_blocks), bool(rest))

    def __str__(self) -> str:
        return f"E={self.exit_layer}, n={self.num_blocks}{', plain' if self.plain else ''}"

    def on(self, model: LayerSkipModel, rows: int) -> LayerSkipModel:
        """The model with such an exit, whose head has so many rows in int8."""
        blocks = [model.decoder.layer(self.exit_layer + number) for number in range(self.num_blocks)]
        sizes = model.num_layers, model.vocab_size
        exit_ = Exit(self.exit_layer, model.head.norm_weight, *sizes, blocks, torch.arange(min(rows, model.vocab_size)))
        bound = exit_.of(model)
        return model.with_exit(gather_exit(bound._replace(blocks=tuple(blocks)) if self.plain else bound))


def passes(args: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """By exit and number of drafts: how long each round took, in the passes before it."""
    hf_model, _ = load(args.model)
    gather_weights(hf_model)
    plain = adapt(hf_model)
    models = {str(shape): (shape, shape.on(plain, args.draft_rows)) for shape in args.exits}
    lengths, token, slot = torch.tensor([args.context]), torch.tensor([100]), torch.tensor([0])
    prompt = torch.randint(plain.vocab_size, (1, args.context), generator=torch.Generator().manual_seed(0))
    rounds: dict[str, Round] = {}
    for name, (shape, model) in models.items():
        cache = model.decoder.new_cache(1, args.context + 2 * max(args.speculations))
        model.prefill(prompt, cache, blocks=True)
        given = {"seq_lens": lengths, "slots": slot}
        rounds[name] = lambda count, m=model, c=cache, e=shape.exit_layer: m.speculate(
            token, c, e, count, seq_lens=lengths.clone(), slots=slot
        )
    rounds[LOOKED_UP] = lambda count: model.head(model.read(prompt[:, : count + 1], cache, **given))
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in args.speculations} for name in rounds}
    turns = [(name, count) for name in rounds for count in args.speculations]
    for repetition in range(args.repeat + 1):
        random.shuffle(turns)
        for name, count in turns:
            start = time.perf_counter()
            model.decode(token, cache, model.num_layers, **given)
            middle = time.perf_counter()
            rounds[name](count)
            if repetition:  # the first is to warm up
                found[name][count].append((time.perf_counter() - middle) / (middle - start))
    return found


def markdown(report: dict[str, Any]) -> str:
    """A table: a line for each exit, a column for each number of drafts."""
    counts = report["settings"]["speculations"]
    lines = [
        f"| passes a round of K drafts | {' | '.join(f'K={count}' for count in counts)} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for name, costs in report["passes"].items():
        lines.append(f"| {name} | {' | '.join(f'{costs[str(count)]:.2f}' for count in counts)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write JSON."""
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
    medians = {name: {str(count): median(all_) for count, all_ in costs.items()} for name, costs in found.items()}
    settings = {**vars(args), "exits": [*map(str, args.exits)], "output": args.output.name}
    report = {"machine": machine(), "settings": settings, "passes": medians}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(report, indent=1).encode())
    print(markdown(report))


if __name__ == "__main__":
    main()
