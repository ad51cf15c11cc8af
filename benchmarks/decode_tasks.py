"""Decoding of the three tasks, stock model beside adapter, in the shape of the paper's tables.

    python -m benchmarks.decode_tasks [--limit 20] [--only parsing:test] [--output benchmarks/results/decode_tasks]

Every line is one run of `layerskip bench --only-ours`, whose two ways alternate over the prompts. Speedup of means is
the ratio of mean times a token, mean speedup the mean of the prompts' ratios, as `layerskip bench` defines them. It
takes quiet cores: a line is worth nothing while something else runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from layerskip import _ends
from layerskip._files import write_atomically
from layerskip.cli import main as layerskip

from .tables import markdown_table

STOCK, ADAPTED = "smollm2", "smollm2-layerskip"  # of the example package
COLUMNS = ("task", "model", "E", "K", "draft head", "acceptance", "AR tokens/s", "self-speculative tokens/s",
           "speedup of means", "mean speedup", "identical")  # fmt: skip


class Point(NamedTuple):
    """The settings of one line of the table; the draft head is ``full`` or the reduced one that comes with a model."""

    prompts: str
    new_tokens: int
    model: str
    exit_layer: int
    drafts: int
    draft_head: str


def points() -> list[Point]:
    """All lines of the table."""
    lines = []
    for split in ("parsing:test", "parsing:test_templates"):
        lines += [Point(split, 64, STOCK, exit_layer, 6, "full") for exit_layer in (3, 4)]
        for exit_layer, drafts in ((3, 6), (4, 6), (4, 8)):
            lines += [Point(split, 64, ADAPTED, exit_layer, drafts, head) for head in ("full", ADAPTED)]
    for task, split in (("coding", "humaneval"), ("summarization", "test")):
        adapted = f"{ADAPTED}-{task}"
        for model, head in ((STOCK, "full"), (adapted, "full"), (adapted, adapted)):
            lines += [
                Point(f"{task}:{split}", 96, model, exit_layer, drafts, head)
                for exit_layer, drafts in ((2, 2), (2, 3), (4, 3))
            ]
    return lines


def measure(point: Point, limit: int, threads: int) -> dict[str, object]:
    """One line, by the names of `COLUMNS`."""
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "bench"
        options = {
            "--model": point.model, "--prompts": point.prompts, "--exit-layer": point.exit_layer,
            "--num-speculations": point.drafts, "--draft-head": point.draft_head, "--limit": limit,
            "--max-new-tokens": point.new_tokens, "--threads": threads, "--output": stem,
        }  # fmt: skip
        code = layerskip(["bench", "--only-ours", *(str(part) for pair in options.items() for part in pair)])
        report = json.loads(stem.with_suffix(".json").read_text())
    if code != 0 or not report["identical"]:
        raise RuntimeError(f"{point}: the self-speculative tokens differ from the autoregressive ones")
    plain, drafted = report["summary"]["autoregressive"], report["summary"]["self-speculative"]
    head = point.draft_head if point.draft_head in ("full", "int8") else "reduced"
    values = (point.prompts, point.model, point.exit_layer, point.drafts, head, drafted["acceptance_rate"],
              plain["tokens_per_second"], drafted["tokens_per_second"], drafted["speedup_of_means"],
              drafted["mean_speedup"], True)  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """The table."""
    shapes = {"acceptance": "{:.1%}", "speedup of means": "{:.2f}×", "mean speedup": "{:.2f}×"}
    shapes |= dict.fromkeys(COLUMNS[6:8], "{:.0f}")
    columns = COLUMNS[:-1]
    cells = ((shapes.get(column, "{}").format(row[column]) for column in columns) for row in rows)
    return markdown_table(columns, cells) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write JSON and Markdown after every line, so that a run cut short leaves what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=20, help="prompts of each line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", help="these prompts alone, such as parsing:test")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decode_tasks"))
    _ends.declare(parser)
    args = parser.parse_args(arguments)
    chosen = [point for point in points() if args.only is None or point.prompts in args.only]
    if not chosen:
        parser.error(f"--only names none of {', '.join(sorted({point.prompts for point in points()}))}")
    rows: list[dict[str, object]] = []
    machine = {"processor": platform.processor(), "torch": torch.__version__, "threads": args.threads}
    for point in chosen:
        rows.append(measure(point, args.limit, args.threads))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        report = json.dumps({**machine, "limit": args.limit, "rows": rows}, indent=1)
        write_atomically(args.output.with_suffix(".json"), report.encode())
        write_atomically(args.output.with_suffix(".md"), markdown(rows).encode())
    print(markdown(rows))


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks.decode_tasks", main))
