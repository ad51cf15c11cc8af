"""What answers come to: means, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..cli.ways import AUTOREGRESSIVE, SELF_SPECULATIVE
from .tasks import PERPLEXITY

Record = dict[str, Any]
SPEEDS = ("tokens/s", "drafts accepted", "accepted a round", "tokens a round")
ROUNDS = (
    "accepted a round: the drafts that one pass of the full model confirmed, without the token that the pass itself "
    "gives; tokens a round: with that token, which Spec-Bench calls mean accepted tokens. An answer's first token, "
    "which reading the prompt gives, is in neither, nor is its time in tokens/s."
)


def summarize(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """By task and way: how many questions, the means of their scores, speed and drafts, the same by kind.

    Parameters
    ----------
    records : sequence of dict
        ``task``, ``way``, ``question`` and ``answer``, of `layerskip.evaluation.answers`.
    """
    results: dict[str, dict[str, Any]] = {}
    for task, way in dict.fromkeys((one["task"], one["way"]) for one in records):
        answers = [one["answer"] for one in records if (one["task"], one["way"]) == (task, way)]
        of = _perplexity if task == PERPLEXITY else _written
        results.setdefault(task, {})[way] = of(answers)
        kinds = dict.fromkeys(one.get("kind", "") for one in answers)
        if len(kinds) > 1:
            by_kind = {kind: _written([one for one in answers if one["kind"] == kind]) for kind in kinds}
            results[task][way]["by_kind"] = by_kind
    return results


def _perplexity(answers: Sequence[Record]) -> Record:
    tokens = sum(one["tokens"] for one in answers)
    total = sum(one["log_likelihood"] for one in answers)
    return {"windows": len(answers), "tokens": tokens, "perplexity": math.exp(-total / tokens)}


def _written(answers: Sequence[Record]) -> Record:
    tokens, seconds, rounds, drafted, accepted = (
        sum(one[key] for one in answers) for key in ("tokens", "seconds", "rounds", "drafted", "accepted")
    )
    result = {
        "questions": len(answers),
        "scores": {name: sum(one["scores"][name] for one in answers) / len(answers) for name in answers[0]["scores"]},
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if tokens else 0.0,
    }
    if drafted:
        result["drafts_accepted"] = accepted / drafted
        result |= {"accepted_a_round": accepted / rounds, "tokens_a_round": tokens / rounds}
    return result


def differing(records: Iterable[Record]) -> list[str]:
    """The answers of self-speculation that are not, token for token, those of the full depth."""
    digests = {(one["task"], one["question"], one["way"]): one["answer"].get("digest") for one in records}
    return [
        f"{task} {question}"
        for (task, question, way), found in digests.items()
        if way == SELF_SPECULATIVE and found != digests.get((task, question, AUTOREGRESSIVE), found)
    ]


def tables(results: dict[str, dict[str, Any]]) -> list[Table]:
    """One a task: a line a way, and where there are kinds, for these too."""
    return [_table(task, ways) for task, ways in results.items()]


def _table(task: str, ways: dict[str, Any]) -> Table:
    first = next(iter(ways.values()))
    counted = f"{first['windows']} windows" if task == PERPLEXITY else f"{first['questions']} questions"
    shown = Table(
        title=f"{task}, {counted}", title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    shown.add_column("", no_wrap=True)
    for column in ["perplexity"] if task == PERPLEXITY else [*first["scores"], *SPEEDS]:
        shown.add_column(column, justify="right")
    for way, result in ways.items():
        shown.add_row(way, *_cells(result))
        for kind, part in result.get("by_kind", {}).items():
            shown.add_row(f"  {kind}", *_cells(part))
    return shown


def _cells(result: Record) -> list[str]:
    if "perplexity" in result:
        return [f"{result['perplexity']:.2f}"]
    cells = [*(f"{score:.1%}" for score in result["scores"].values()), f"{result['tokens_per_second']:.1f}"]
    if "drafts_accepted" in result:
        cells.append(f"{result['drafts_accepted']:.0%}")
        cells += [f"{result[key]:.2f}" for key in ("accepted_a_round", "tokens_a_round")]
    return cells
