"""The CPU ops on this machine: ``python -m benchmarks``, ``make bench``.

Every op, in the shapes of real models, for several numbers of rows and in every format of weights, beside torch's own:
checked against a higher precision first, then in turns, cold and warm, and beside the memory's read speed. Each row is
written as it is measured. With ``--document`` the table of a document is renewed, between its two markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from layerskip import _ends
from layerskip._files import write_atomically
from layerskip.bandwidth import ReadBandwidth

from .cases import MODELS, OPS, PLAIN
from .harness import measure
from .tables import document, markdown, picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; write JSON lines, a picture and, if asked for, a document."""
    args = _parsed(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = args.output.with_suffix(".jsonl")
    unfinished = lines.with_suffix(".unfinished")
    rows, memory = [], ReadBandwidth()
    with unfinished.open("w") as file, Progress() as progress, torch.inference_mode():
        task = progress.add_task("", total=len(args.models) * len(args.ops) * len(args.rows))
        for model in args.models:
            for op in args.ops:
                progress.update(task, description=f"{op}, {model}")
                for group in OPS[op](model, MODELS[model], args.rows, args.formats):
                    for row in measure(group, args.repeats, memory):
                        rows.append(row)
                        print(json.dumps(row), file=file, flush=True)
                    progress.advance(task)
    unfinished.rename(lines)
    print(markdown(rows))
    write_atomically(args.picture or args.output.with_suffix(".png"), picture(rows))
    if args.document:
        write_atomically(args.document, document(args.document.read_text(encoding="utf-8"), rows).encode())
    wrong = [row for row in rows if isinstance(row["error"], str)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} results are wrong, the first: {wrong[0]['op']}, {wrong[0]['error']}")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 6, 9, 16])
    parser.add_argument("--formats", nargs="+", default=[PLAIN, "int8", "int4"], help=f"{PLAIN} or packed ones")
    parser.add_argument("--repeats", type=int, default=9, help="calls of each case, at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ops"), help="without .jsonl and .png")
    parser.add_argument("--picture", type=Path, help="where the PNG goes instead")
    parser.add_argument("--document", type=Path, help="a document whose table is renewed, as docs/benchmarks.md")
    _ends.declare(parser)
    args = parser.parse_args(arguments)
    if args.repeats < 2 or min(args.rows) < 1:
        parser.error("--repeats must be at least 2, and --rows at least 1")
    return args


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks", main))
