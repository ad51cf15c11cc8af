"""Evaluate a model at full depth, at an early exit and self-speculatively, on tasks.

Every answer is kept as it is given, in OUTPUT.partial: started again, the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from .._files import Journal, check_output, write_atomically
from ..evaluation.answers import Item, digest, scored, warm_up, written
from ..evaluation.engine import Engine
from ..evaluation.summary import ROUNDS, differing, summarize, tables
from ..evaluation.tasks import PERPLEXITY, WRITTEN, Question
from ..models import LayerSkipModel
from ..training.exit_analysis import spread, windows
from . import options, quantize

WINDOW = quantize.WINDOW


def run(args: argparse.Namespace, console: Console) -> int:
    """Ask, show, write; 1 if self-speculation gave other tokens than the full depth."""
    check_output(args.output, args.overwrite)
    if "humaneval" in args.tasks and not args.run_code:
        raise ValueError("humaneval runs programs that the model has written; --run-code allows it")
    questions = {name: spread(WRITTEN[name].questions(), args.limit) for name in args.tasks if name in WRITTEN}
    texts = quantize.long_texts(args.text) if PERPLEXITY in args.tasks else []
    model, tokenizer = options.load(args, Console(stderr=True))
    engine = _engine(args, model, tokenizer)
    items = [item for name, some in questions.items() for item in written(engine, WRITTEN[name], some)]
    if texts:
        items += scored(engine, spread(windows(tokenizer, texts, WINDOW), args.limit))
    for name, some in list(questions.items())[:1]:
        warm_up(engine, WRITTEN[name], some[0])
    work = _work(args, engine, {**questions, PERPLEXITY: [Question((text,)) for text in texts]})
    journal = Journal(args.output.with_name(f"{args.output.name}.partial"), work, args.overwrite)
    _ask(items, journal, console)
    records = journal.records
    results, wrong = summarize(records), differing(records)
    _show(console, results, wrong)
    report = {"settings": {**work, "threads": torch.get_num_threads()}, "identical": not wrong, "results": results,
              "answers": records}  # fmt: skip
    write_atomically(args.output, json.dumps(report, indent=1, ensure_ascii=False).encode())
    journal.remove()
    console.print(f"wrote {args.output}", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _engine(args: argparse.Namespace, model: Any, tokenizer: Any) -> Engine:
    decoder = options.decoder(args, model)
    if not isinstance(decoder.exit_layer, int):
        raise ValueError(
            f"--exit-layer is {decoder.exit_layer}, but an early exit is after a number of layers; give it"
        )
    return Engine(decoder, tokenizer, decoder.exit_layer, args.max_new_tokens)


def _work(args: argparse.Namespace, engine: Engine, questions: dict[str, Sequence[Question]]) -> dict[str, Any]:
    """What the answers depend on."""
    keys = ("model", "dtype", "weights", "exit", "num_speculations", "draft_threshold", "draft_head", "draft_source",
            "tasks", "limit", "max_new_tokens")  # fmt: skip
    given = {key: getattr(args, key) for key in keys}
    return {**given, "exit_layer": engine.exit_layer, "layers": engine.decoder.model.num_layers,
            "device": args.device.type, "digest of the questions": digest(questions),
            "digest of the weights": _digest_of(engine.decoder.model)}  # fmt: skip


def _digest_of(model: LayerSkipModel) -> str:
    """Of some numbers of every weight, by which another model at the same path is told apart."""
    weights = (weight.detach().flatten() for weight in model.parameters())
    some = [weight[:: max(1, weight.numel() // 64)].double().tolist() for weight in weights]
    return hashlib.sha256(repr(some).encode()).hexdigest()


def _ask(items: Sequence[Item], journal: Journal, console: Console) -> None:
    """Ask what the journal has no answer to."""
    before = {(one["task"], one["question"], one["way"]) for one in journal.records}
    if before:
        console.print(f"{len(before)} answers are in {journal.path}, the others follow", soft_wrap=True)
    left = [item for item in items if item.key not in before]
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            shown = progress.add_task("asking", total=len(items), completed=len(before))
            for item in left:
                progress.update(shown, description=f"{item.task}, {item.way}")
                journal.append({**dict(zip(("task", "question", "way"), item.key, strict=True)), "answer": item.ask()})
                progress.advance(shown)
    except KeyboardInterrupt:
        kept = f"{len(journal.records)} of {len(items)} answers are in {journal.path}"
        raise KeyboardInterrupt(f"interrupted; {kept}, the same command goes on there") from None
    finally:
        journal.close()


def _show(console: Console, results: dict[str, dict[str, Any]], wrong: Sequence[str]) -> None:
    for table in tables(results):
        console.print(table, "")
    if results.keys() & WRITTEN.keys():
        console.print(ROUNDS, style="dim")
        if wrong:
            console.print(f"[red]✗ self-speculation gave other tokens than the full depth: {', '.join(wrong)}[/red]")
        else:
            console.print("[green]✓ self-speculation gave the tokens of the full depth[/green]")
