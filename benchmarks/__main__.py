"""``python -m benchmarks``: the CPU ops on this machine, as a table and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import ops
from .harness import Result, machine, write


def _table(results: list[Result]) -> Table:
    table = Table("what", "measured", "goal", "")
    for result in results:
        mark = "" if result.met is None else "[green]met[/]" if result.met else "[red]missed[/]"
        table.add_row(result.name, f"{result.value:.3f} {result.unit}", result.goal, mark)
    return table


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="timings of each case")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_ops.json"))
    args = parser.parse_args()
    console = Console()
    results: list[Result] = []
    for suite in (ops.exit_head, ops.linear, ops.partial_forward):
        results += suite(args.repeats)
    results += ops.peak_memory()
    console.print(_table(results))
    console.print(str(machine()))
    write(args.output, results)
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
