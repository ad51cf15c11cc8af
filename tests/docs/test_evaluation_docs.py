"""docs/evaluation.md tells what was measured, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import evaluation
from layerskip.cli.arguments import parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
RUNS = json.loads((ROOT / "benchmarks/results/evaluation.json").read_text(encoding="utf-8"))


def test_all_was_run_as_it_would_be_now() -> None:
    assert RUNS.keys() == evaluation.RUNS.keys()
    for name, run in RUNS.items():
        args, settings = parse(evaluation.arguments(name)), run["settings"]
        for key in ("model", "tasks", "limit", "exit", "num_speculations"):
            assert settings[key] == getattr(args, key), (name, key)
        assert run["identical"]


@pytest.mark.parametrize("name", ["tasks", "spec", "perplexity"])
def test_the_tables_are_those_of_the_results(name: str) -> None:
    assert evaluation.markdown(RUNS)[name] in TEXT


def test_every_figure_is_in_a_table() -> None:
    """Those with a decimal point; versions have two of them."""
    tables = "".join(evaluation.markdown(RUNS).values())
    said = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for line in tables.splitlines():
        said = said.replace(line, "")
    for figure in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", said):
        assert figure in tables, figure
