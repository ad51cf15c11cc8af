"""benchmarks/results/evaluation.md has the figures of the runs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import evaluation
from layerskip.cli.arguments import parse

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
RUNS = json.loads((RESULTS / "evaluation.json").read_text(encoding="utf-8"))


def test_all_was_run_as_it_would_be_now() -> None:
    assert RUNS.keys() == evaluation.RUNS.keys()
    for name, run in RUNS.items():
        args, settings = parse(evaluation.arguments(name)), run["settings"]
        for key in ("model", "tasks", "limit", "exit", "num_speculations"):
            assert settings[key] == getattr(args, key), (name, key)
        assert run["identical"]


def test_the_page_has_the_figures_of_the_runs() -> None:
    assert evaluation.page(RUNS) == (RESULTS / "evaluation.md").read_text(encoding="utf-8")
