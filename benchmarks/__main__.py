"""The ops on this machine: ``python -m benchmarks``, ``make bench``.

Every op, in the shapes of real models, for several numbers of rows, in every format of weights and on every backend,
beside torch's own code, the same compiled, and what other libraries have for it: checked against a higher precision
first, then in turns, cold and warm, and beside the memory's read speed. Peers that are not installed are skipped, with
the reason. Each row is written as it is measured; the page of tables and its picture are written at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from layerskip import _ends, devices
from layerskip._files import write_atomically
from layerskip.cli.arguments import device as known
from layerskip.devices import ReadBandwidth
from layerskip_kernels.dispatch import BACKENDS, PREFERENCE
from layerskip_kernels.formats import FORMATS

from .cases import MODELS, OPS, PLAIN, Make
from .harness import groups, measure
from .tables import markdown, page, picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; write JSON lines and, if all results are right, the page and its picture."""
    args = _parsed(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = _read(args.measured) if args.measured else _measured(args)
    print(markdown(rows))
    wrong = [row for row in rows if "wrong" in row and row["variant"] in BACKENDS]
    if wrong:
        raise RuntimeError(f"{len(wrong)} results are wrong, the first: {wrong[0]['op']}, {wrong[0]['wrong']}")
    write_atomically(args.output.with_suffix(".png"), picture(rows))
    write_atomically(args.output.with_suffix(".md"), page(rows, args.output.name).encode())


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, which are in a file of their own until all are there; KeyboardInterrupt says in which."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = args.output.with_suffix(".jsonl")
    unfinished = lines.with_suffix(".unfinished")
    rows = []
    try:
        with unfinished.open("w") as file:
            for row in _rows(args):
                rows.append(row)
                print(json.dumps(row), file=file, flush=True)
    except KeyboardInterrupt as stop:
        kept = f"{len(rows)} rows are in {unfinished}, and --measured {unfinished} shows them"
        raise KeyboardInterrupt(f"interrupted: {kept}; nothing else was written") from stop
    unfinished.rename(lines)
    return rows


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = devices.find(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    memory = ReadBandwidth(device)
    with Progress() as progress:
        task = progress.add_task("", total=len(args.models) * len(args.ops))
        for model in args.models:
            for op in args.ops:
                progress.update(task, description=f"{op}, {model}")
                yield from _rows_of(model, op, args, memory, device, lambda share: progress.advance(task, share))


def _rows_of(
    model: str, op: str, args: argparse.Namespace, memory: ReadBandwidth, device: torch.device,
    advance: Callable[[float], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Those of one case, whose weights go when it ends."""
    case = OPS[op](MODELS[model], sorted(set(args.rows)), Make(device))
    for group in groups(case, model, args.formats, args.backends or PREFERENCE[device.type], device):
        with torch.inference_mode():
            found = list(measure(group, args.repeats, memory, device))
        yield from found
        advance(1 / len(case.counts))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 6, 9, 16])
    parser.add_argument("--formats", nargs="+", choices=[PLAIN, *FORMATS], default=[PLAIN, "int8", "int4"])
    parser.add_argument("--device", type=known, default="cpu", help="cpu, cuda, cuda:N, or auto, a GPU if there is one")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="by default all that the device has")
    parser.add_argument("--repeats", type=int, default=9, help="calls of each case at most, at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ops"), help="without .jsonl, .md, .png")
    parser.add_argument("--measured", type=Path, help="measure nothing: take the rows of this file")
    _ends.declare(parser)
    args = parser.parse_args(arguments)
    if args.repeats < 2 or min(args.rows) < 1:
        parser.error("--repeats must be at least 2, and --rows at least 1")
    return args


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks", main))
