"""What packed weights cost: perplexity on text, exact match and agreement of the exits on a task, in every format.

    python -m benchmarks.weights --windows 16 --limit 50

One line of JSON a format, then a table. A format followed by "calibrated" is rounded with a look at 2048 tokens of the
training text.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from layerskip.models import adapt, load
from layerskip.training.data import documents, load_task
from layerskip.training.exit_analysis import evaluate_exits, perplexity, spread
from layerskip_kernels.formats import FORMATS

from .tables import markdown_table

PLAIN = "plain"


def main() -> None:
    args = parsed()
    texts = documents("text", "test")
    examples = spread(load_task(args.task, "test"), args.limit)
    rows = []
    for weights in args.formats:
        row: dict[str, Any] = {"weights": weights}
        try:
            model, tokenizer = in_format(args.model, weights, args.dtype)
        except ValueError as error:
            print(json.dumps({**row, "refused": str(error)}), flush=True)
            continue
        row["megabytes"] = sum(weight.nbytes for weight in model.parameters()) / 1e6
        row["perplexity"] = perplexity(model, tokenizer, texts, limit=args.windows)
        model, tokenizer = in_format(args.task_model, weights, args.dtype)
        report = evaluate_exits(model, tokenizer, examples, args.exits)
        row |= {"exact_match": report.exact_match, "agreement": report.agreement}
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(table(rows, args.exits))


def in_format(name: str, weights: str, dtype: str) -> tuple[Any, Any]:
    """A model of bf16 weights, packed or not; its states are in ``dtype``."""
    model, tokenizer = load(name, torch.bfloat16)
    packed = adapt(model).to(getattr(torch, dtype))
    if weights != PLAIN:
        form, _, calibrated = weights.partition(" ")
        packed = packed.quantize(form, release=True, calibration=calibration(tokenizer) if calibrated else ())
    return packed, tokenizer


def calibration(tokenizer: Any) -> list[torch.Tensor]:
    texts = (torch.tensor(tokenizer(text).input_ids[:256]) for text in documents("text", "train"))
    return [ids for ids in texts if len(ids) == 256][:8]


def table(rows: list[dict[str, Any]], exits: list[int]) -> str:
    base = next((row["perplexity"] for row in rows if row["weights"] == PLAIN), rows[0]["perplexity"])
    columns = ["weights", "MB", "perplexity", "change", "exact match", *(f"exit {number}" for number in exits)]
    lines = []
    for row in rows:
        change = f"{row['perplexity'] / base - 1:+.2%}"
        agreement = [f"{row['agreement'][number]:.1%}" for number in exits]
        exact = f"{row['exact_match']:.0%}"
        lines.append([row["weights"], f"{row['megabytes']:.0f}", f"{row['perplexity']:.3f}", change, exact, *agreement])
    return markdown_table(columns, lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="whose perplexity")
    parser.add_argument("--task-model", default="smollm2-layerskip", help="whose exact match and exits")
    parser.add_argument("--task", default="parsing")
    parser.add_argument("--formats", nargs="+", default=[PLAIN, *FORMATS, "int4 calibrated", "int4_zero calibrated"])
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens")
    parser.add_argument("--limit", type=int, default=50, help="examples of the task")
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 4, 8, 15])
    parser.add_argument("--dtype", default="float32", help="of the states; the weights that are packed are bf16's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
