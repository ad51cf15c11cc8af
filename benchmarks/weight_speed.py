"""How fast models with packed weights decode: tokens/s, autoregressive and self-speculative, in every format.

    python -m benchmarks.weight_speed [--formats int8 int4] [--limit 8] [--output benchmarks/results/weight_speed]

All formats are in memory at once and take turns prompt by prompt, so that each sees the same machine; medians over the
prompts and rounds count. Self-speculative tokens must be the autoregressive ones of the same weights, to the bit. The
speed of memory is measured in between: "of memory" is the bytes of weights that autoregressive decoding reads in a
second over it. ``--cpu-time --threads 1`` counts what this process used, for a machine that others use, too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from layerskip import DraftHead, SelfSpeculativeDecoder, _ends
from layerskip._files import write_atomically
from layerskip.cli.arguments import read_prompts
from layerskip.devices import ReadBandwidth
from layerskip_kernels import cpu_isa
from layerskip_kernels.formats import FORMATS

from .tables import markdown_table

PLAIN = "bf16"
WAYS = ("autoregressive", "self_speculative")
COLUMNS = ("weights", "MB read a token", "autoregressive", "over bf16", "of memory", "self-speculative", "over its own")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write JSON."""
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    prompts = [prompt.text for prompt in read_prompts(args.prompts, args.limit)]
    decoders = {name: decoder_in(name, args) for name in (PLAIN, *args.formats)}
    for decoder in decoders.values():
        decoder.clock = clock
    speeds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in decoders}
    memory = ReadBandwidth()
    for _ in range(args.repeat):
        for prompt in prompts:
            memory.sample()
            for name, decoder in decoders.items():
                for way, speed in zip(WAYS, one_turn(decoder, prompt, args.max_new_tokens), strict=True):
                    speeds[name][way].append(speed)
    rows = [row(name, decoder, speeds, memory.median) for name, decoder in decoders.items()]
    report = {
        "command": sys.argv[1:], "processor": platform.processor(), "instruction_set": cpu_isa(),
        "torch": torch.__version__, "threads": args.threads, "cpu_time": args.cpu_time,
        "memory_gb_s": memory.median, "rows": rows, "tokens_per_second": speeds,
    }  # fmt: skip
    write_atomically(args.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
    print(f"memory: {memory.median:.1f} GB/s")
    print(table(rows))


def decoder_in(name: str, args: argparse.Namespace) -> SelfSpeculativeDecoder:
    """The model in a format."""
    return SelfSpeculativeDecoder.from_pretrained(
        args.model, weights=None if name == PLAIN else name, exit_layer=args.exit_layer,
        num_speculations=args.num_speculations,
        draft_head=args.draft_head if args.draft_head in ("full", "int8") else DraftHead.load(args.draft_head),
    )  # fmt: skip


def one_turn(decoder: SelfSpeculativeDecoder, prompt: str, count: int) -> list[float]:
    """Tokens a second of each way on one prompt."""
    ids = decoder.tokenizer(prompt, return_tensors="pt").input_ids
    outputs = [decoder.generate(ids, max_new_tokens=count, strategy=way) for way in WAYS]
    if not torch.equal(outputs[0].sequences, outputs[1].sequences):
        raise RuntimeError(f"self-speculative tokens differ from the autoregressive ones on {prompt!r}")
    return [output.stats.decode_tokens_per_second for output in outputs]


def row(name: str, decoder: SelfSpeculativeDecoder, speeds: dict[str, dict[str, list[float]]], memory: float) -> dict:
    """A line of the table by the names of COLUMNS."""
    model = decoder.model
    read = sum(weight.nbytes for weight in model.decoder.parameters()) + model.head.head_weight.nbytes
    plain, drafted = (statistics.median(speeds[name][way]) for way in WAYS)
    base = statistics.median(speeds[PLAIN][WAYS[0]])
    values = (name, read / 1e6, plain, plain / base, plain * read / 1e9 / memory, drafted, drafted / plain)
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: Sequence[dict]) -> str:
    shapes = ("{}", "{:.0f}", "{:.0f}", "{:.2f}×", "{:.0%}", "{:.0f}", "{:.2f}×")
    cells = ((shape.format(row[column]) for shape, column in zip(shapes, COLUMNS, strict=True)) for row in rows)
    return markdown_table(COLUMNS, cells)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-layerskip")
    parser.add_argument("--draft-head", default="smollm2-layerskip", help="full, int8, or a name or file of one")
    parser.add_argument("--exit-layer", type=int, default=4)
    parser.add_argument("--num-speculations", type=int, default=8)
    parser.add_argument("--prompts", default="parsing:test")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--formats", nargs="+", default=["int8", "int4", "int4_zero", "fp8"], choices=FORMATS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/weight_speed"), help="without .json")
    _ends.declare(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks.weight_speed", main))
