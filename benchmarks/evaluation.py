"""Evaluate the models of the example package; benchmarks/results/evaluation.md has the tables.

    python -m benchmarks.evaluation [--threads 1] [--output benchmarks/results/evaluation]

Every run is one of `layerskip eval`. Its report stays in a folder: run the same command again to continue.
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
from layerskip.cli.eval import DRAFTED, EARLY, FULL

STOCK, ADAPTED = "smollm2", "smollm2-layerskip"  # of the example package
FOUR = ("--num-speculations", "4")
OWN_EXIT = ("--exit", STOCK, *FOUR)
RUNS = {
    f"{STOCK}, tasks": (STOCK, "parsing summarization", 20, OWN_EXIT),
    f"{STOCK}, problems": (STOCK, "humaneval_local", 60, OWN_EXIT),
    f"{STOCK}, spec": (STOCK, "spec", 30, OWN_EXIT),
    f"{STOCK}, spec, n-grams": (STOCK, "spec", 30, ("--draft-source", "ngram", "--exit-layer", "2", *FOUR)),
    f"{STOCK}, perplexity": (STOCK, "perplexity", 24, OWN_EXIT),
    f"{ADAPTED}, tasks": (ADAPTED, "parsing", 100, ("--exit-layer", "4", "--num-speculations", "8")),
    f"{ADAPTED}, perplexity": (ADAPTED, "perplexity", 24, ("--exit-layer", "4", *FOUR)),
    f"{ADAPTED}-coding, tasks": (
        f"{ADAPTED}-coding", "humaneval_local", 60, ("--exit-layer", "2", "--num-speculations", "3"),
    ),
    f"{ADAPTED}-coding, perplexity": (f"{ADAPTED}-coding", "perplexity", 24, ("--exit-layer", "2", *FOUR)),
    f"{ADAPTED}-summarization, tasks": (
        f"{ADAPTED}-summarization", "summarization", 20, ("--exit-layer", "2", "--num-speculations", "2"),
    ),
    f"{ADAPTED}-summarization, perplexity": (
        f"{ADAPTED}-summarization", "perplexity", 24, ("--exit-layer", "2", *FOUR),
    ),
}  # fmt: skip
"""By name: the model, its tasks, the limit, and what drafts."""


def arguments(name: str) -> list[str]:
    """The command line of `layerskip eval`, without threads and output."""
    model, tasks, limit, drafts = RUNS[name]
    code = ["--run-code"] if "humaneval" in tasks else []
    return ["eval", *tasks.split(), "--model", model, "--limit", str(limit), *drafts, *code]


def measure(name: str, threads: int, folder: Path) -> dict[str, Any]:
    """Settings and results of one run, from its report in the folder if there is one."""
    path = folder / f"{name.replace(', ', '-')}.json"
    if not path.exists():
        code = layerskip([*arguments(name), "--threads", str(threads), "--output", str(path)])
        if code != 0:
            raise RuntimeError(f"{name}: layerskip eval ended with exit code {code}")
    report = json.loads(path.read_text(encoding="utf-8"))
    return {key: report[key] for key in ("settings", "identical", "results")}


def page(runs: dict[str, Any]) -> str:
    """All tables."""
    return f"""# Evaluation

SmolLM2-135M-Instruct in bf16 and the adapters of [examples/smollm2](../../examples/smollm2/README.md), which draft with
the whole head of the model (`python -m benchmarks.evaluation`). These figures do not depend on the speed of the
machine. In every run self-speculation gave the tokens of the full depth.

{_tasks(runs)}
`spec`: drafts from the trained exit of the stock model (`--exit smollm2`, K=4) and from n-grams
(`--draft-source ngram`).

{_spec(runs)}
Bits per byte of Python's manual, in 24 pieces of 2000 characters:

{_perplexity(runs)}"""


def _table(header: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [header, "|---" * (header.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _tasks(runs: dict[str, Any]) -> str:
    rows = []
    for name, run in runs.items():
        for task, ways in run["results"].items():
            if task in ("spec", "perplexity"):
                continue
            drafted = ways[DRAFTED]
            for measure_name in ways[FULL]["scores"]:
                scores = [f"{ways[way]['scores'][measure_name]:.1%}" for way in (FULL, EARLY)]
                drafts = [f"{drafted['drafts_accepted']:.0%}", f"{drafted['tokens_a_round']:.2f}"]
                asked = f"{task} ({drafted['questions']}), {measure_name}"
                rows.append([asked, f"`{name.split(', ')[0]}`", str(run["settings"]["exit_layer"]), *scores, *drafts])
    header = (
        "| task (questions), measure | model | E | full depth | layers [0, E) alone | drafts accepted | "
        "tokens a round |"
    )
    return _table(header, rows)


def _spec(runs: dict[str, Any]) -> str:
    sources = [runs[f"{STOCK}, spec{source}"]["results"]["spec"][DRAFTED] for source in ("", ", n-grams")]
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
            values = [f"{ways[way]['scores']['bits_per_byte']:.2f}" for way in (FULL, EARLY)]
            rows.append([f"`{name.split(', ')[0]}`", str(run["settings"]["exit_layer"]), *values])
    return _table("| model | E | full depth | layers [0, E) alone |", rows)


def main(words: Sequence[str] | None = None) -> None:
    """Evaluate; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evaluation"), help="for .json and .md")
    parser.add_argument("--answers", type=Path, default=Path("build/evaluation"), help="a folder for all answers")
    _ends.declare(parser)
    args = parser.parse_args(words)
    args.answers.mkdir(parents=True, exist_ok=True)
    runs = {name: measure(name, args.threads, args.answers) for name in RUNS}
    write_atomically(args.output.with_suffix(".json"), json.dumps(runs, indent=1).encode())
    write_atomically(args.output.with_suffix(".md"), page(runs).encode())


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks.evaluation", main))
