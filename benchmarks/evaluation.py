"""What the example package's models are worth, as docs/evaluation.md tells it.

    python -m benchmarks.evaluation [--threads 1] [--output benchmarks/results/evaluation.json]

Every run is one of `layerskip eval`; its answers stay in a folder, so that a run that was stopped goes on, and what is
done is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerskip import _ends
from layerskip._files import write_atomically
from layerskip.cli import main as layerskip
from layerskip.cli.ways import AUTOREGRESSIVE, EARLY_EXIT, SELF_SPECULATIVE

STOCK, ADAPTED = "smollm2", "smollm2-layerskip"  # of the example package
OWN_EXIT = ("--exit", STOCK)
RUNS = {
    f"{STOCK}, tasks": (STOCK, "parsing summarization", 20, OWN_EXIT),
    f"{STOCK}, problems": (STOCK, "humaneval", 60, OWN_EXIT),
    f"{STOCK}, spec": (STOCK, "spec", 25, OWN_EXIT),
    f"{STOCK}, spec, n-grams": (STOCK, "spec", 25, ("--draft-source", "ngram", "--exit-layer", "2")),
    f"{STOCK}, perplexity": (STOCK, "perplexity", 24, OWN_EXIT),
    f"{ADAPTED}, tasks": (ADAPTED, "parsing", 100, ("--exit-layer", "4", "--num-speculations", "8")),
    f"{ADAPTED}, perplexity": (ADAPTED, "perplexity", 24, ("--exit-layer", "4")),
    f"{ADAPTED}-coding, tasks": (
        f"{ADAPTED}-coding", "humaneval", 60, ("--exit-layer", "2", "--num-speculations", "3"),
    ),
    f"{ADAPTED}-coding, perplexity": (f"{ADAPTED}-coding", "perplexity", 24, ("--exit-layer", "2")),
    f"{ADAPTED}-summarization, tasks": (
        f"{ADAPTED}-summarization", "summarization", 20, ("--exit-layer", "2", "--num-speculations", "2"),
    ),
    f"{ADAPTED}-summarization, perplexity": (f"{ADAPTED}-summarization", "perplexity", 24, ("--exit-layer", "2")),
}  # fmt: skip
"""By name: the model, its tasks, the limit, and what drafts."""


def arguments(name: str) -> list[str]:
    """Of `layerskip eval`, without threads and output."""
    model, tasks, limit, drafts = RUNS[name]
    code = ["--run-code"] if "humaneval" in tasks else []
    return ["eval", *tasks.split(), "--model", model, "--limit", str(limit), *drafts, *code]


def measure(name: str, threads: int, folder: Path) -> dict[str, Any]:
    """Settings and results of one run; what is in the folder is taken from there."""
    path = folder / f"{name.replace(', ', '-')}.json"
    if not path.exists():
        code = layerskip([*arguments(name), "--threads", str(threads), "--output", str(path)])
        if code != 0:
            raise RuntimeError(f"{name}: layerskip eval ended with exit code {code}")
    report = json.loads(path.read_text(encoding="utf-8"))
    return {key: report[key] for key in ("settings", "identical", "results")}


def markdown(runs: dict[str, Any]) -> dict[str, str]:
    """The tables of the document, by name."""
    return {"tasks": _tasks(runs), "spec": _spec(runs), "perplexity": _perplexity(runs)}


def _table(header: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [header, "|---" * (header.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _tasks(runs: dict[str, Any]) -> str:
    rows = []
    for name, run in runs.items():
        for task, ways in run["results"].items():
            if task in ("spec", "perplexity"):
                continue
            drafted = ways[SELF_SPECULATIVE]
            for measure_name in ways[AUTOREGRESSIVE]["scores"]:
                scores = [f"{ways[way]['scores'][measure_name]:.1%}" for way in (AUTOREGRESSIVE, EARLY_EXIT)]
                same = "the same answers" if run["identical"] else "other answers"
                drafts = [same, f"{drafted['drafts_accepted']:.0%}", f"{drafted['tokens_a_round']:.2f}"]
                asked = f"{task} ({drafted['questions']}), {measure_name}"
                rows.append([asked, f"`{name.split(', ')[0]}`", str(run["settings"]["exit_layer"]), *scores, *drafts])
    header = (
        "| task (questions), measure | model | E | full depth | layers [0, E) alone | self-speculation | "
        "drafts accepted | tokens a round |"
    )
    return _table(header, rows)


def _spec(runs: dict[str, Any]) -> str:
    sources = [runs[f"{STOCK}, spec{source}"]["results"]["spec"][SELF_SPECULATIVE] for source in ("", ", n-grams")]
    kinds = [(kind, [one["by_kind"][kind] for one in sources]) for kind in sources[0]["by_kind"]]
    rows = [[kind, str(parts[0]["questions"]), *_drafts(*parts)] for kind, parts in [*kinds, ("all", sources)]]
    of_each = "drafts accepted | accepted a round | tokens a round"
    return _table(f"| kind | prompts | {of_each} | n-grams: {of_each} |", rows)


def _drafts(*results: dict[str, Any]) -> list[str]:
    return [
        cell
        for one in results
        for cell in (f"{one['drafts_accepted']:.0%}", f"{one['accepted_a_round']:.2f}", f"{one['tokens_a_round']:.2f}")
    ]


def _perplexity(runs: dict[str, Any]) -> str:
    rows = []
    for name, run in runs.items():
        ways = run["results"].get("perplexity")
        if ways:
            values = [f"{ways[way]['perplexity']:,.1f}" for way in (AUTOREGRESSIVE, EARLY_EXIT)]
            rows.append([f"`{name.split(', ')[0]}`", str(run["settings"]["exit_layer"]), *values])
    return _table("| model | E | full depth | layers [0, E) alone |", rows)


def main(words: Sequence[str] | None = None) -> None:
    """Run what is not there yet, write after every run, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evaluation.json"))
    parser.add_argument("--answers", type=Path, default=Path("build/evaluation"), help="a folder for all answers")
    _ends.declare(parser)
    args = parser.parse_args(words)
    runs: dict[str, Any] = {}
    for name in RUNS:
        runs[name] = measure(name, args.threads, args.answers)
        write_atomically(args.output, json.dumps(runs, indent=1).encode())
    for table in markdown(runs).values():
        print(table)


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks.evaluation", main))
