"""Evaluate a model at full depth, at an early exit and with self-speculation on tasks of lm-eval.

Answers are cached in OUTPUT.partial as they are given: run the same command again to continue.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import registry
from .._files import differences, reserved, write_atomically
from .._imports import need
from ..decoding.request import RequestDefaults
from ..models.files import digest_of_weights
from . import options

FULL, EARLY, DRAFTED = STRATEGIES = ("autoregressive", "early_exit", "self_speculative")
HEADS = ("full depth", "early exit", "with drafts")
ROUNDS = (
    "accepted a round: draft tokens that one pass of the full model confirmed; tokens a round: with the token that the "
    "pass itself gives, which Spec-Bench calls mean accepted tokens. The first token of an answer counts in neither, "
    "nor does its time in tokens/s."
)
Record = dict[str, Any]


def run(args: argparse.Namespace, console: Console) -> int:
    """Evaluate, print, write; return 1 if self-speculation gave other tokens than the full depth."""
    with reserved(args.output, args.overwrite, (args.text, *args.tasks)):
        return _eval(args, console)


def _eval(args: argparse.Namespace, console: Console) -> int:
    tasks = load_tasks(args)
    model, tokenizer = options.load(args, Console(stderr=True))
    models = _models(args, model, tokenizer)
    decoder = models[DRAFTED].decoder
    settings: Record = {key: getattr(args, key) for key in ("model", "dtype", "weights", "exit", "draft_head")}
    drafting = ("exit_layer", "num_speculations", "draft_threshold", "draft_source")
    settings |= {key: getattr(decoder, key) for key in drafting}
    settings |= {"layers": decoder.model.num_layers, "device": args.device.type,
                 "digest of the weights": digest_of_weights(decoder.model)}  # fmt: skip
    cache = _cache(args, settings)
    results: dict[str, dict[str, Record]] = {}
    answers: list[Record] = []
    for task in tasks:
        generates = any(leaf.OUTPUT_TYPE == "generate_until" for leaf in task["tasks"].values())
        for strategy in STRATEGIES if generates else (FULL, EARLY):  # nothing drafts log-likelihoods
            report = _evaluate(args, models[strategy], task, cache / strategy)
            for name, scores in report["results"].items():
                found = [record_of(name, strategy, sample) for sample in report["samples"].get(name, [])]
                results.setdefault(name, {})[strategy] = summarize(scores, found)
                answers += found
    wrong = differing(answers)
    settings |= {"tasks": args.tasks, "limit": args.limit, "max_new_tokens": args.max_new_tokens,
                 "threads": torch.get_num_threads()}  # fmt: skip
    report = {"settings": settings, "identical": not wrong, "results": results, "answers": answers}
    as_json = need("lm_eval.utils", "evaluating").handle_non_serializable
    write_atomically(args.output, json.dumps(report, indent=1, ensure_ascii=False, default=as_json).encode())
    shutil.rmtree(cache)
    for table in tables(results):
        console.print(table, "")
    if any(DRAFTED in strategies for strategies in results.values()):
        console.print(ROUNDS, style="dim")
        if wrong:
            console.print(f"[red]✗ self-speculation gave other tokens than the full depth: {', '.join(wrong)}[/red]")
        else:
            console.print("[green]✓ self-speculation gave the tokens of the full depth[/green]")
    console.print(f"wrote {args.output}", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def load_tasks(args: argparse.Namespace) -> list[Record]:
    """Build the tasks and groups that are named, each as `TaskManager.load` returns it."""
    manager_of = need("lm_eval.tasks", "evaluating").TaskManager
    from ..evaluation import TASKS

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are for authors of tasks
    common: Record = {"include_path": [TASKS, *args.include_path], "metadata": {"text": args.text}}
    manager = manager_of(include_defaults=False, **common)
    if any(name not in manager.all_tasks and not Path(name).is_file() for name in args.tasks):
        manager = manager_of(**common)  # reads all of lm-eval's tasks, which takes seconds
    for name in args.tasks:
        entry = manager.task_index.get(name)
        if entry is None and not Path(name).is_file():
            raise ValueError(f"unknown task {name!r}; {registry.nearest(name, manager.all_tasks)}")
        if entry is not None and (entry.cfg or {}).get("unsafe_code") and not args.run_code:
            raise ValueError(f"{name} runs programs that the model has written; --run-code allows it")
    if args.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # lm-eval's own sandbox asks for it
    return [manager.load([name]) for name in dict.fromkeys(args.tasks)]


def _models(args: argparse.Namespace, model: Any, tokenizer: Any) -> Record:
    """The model class of lm-eval for each strategy, around one model."""
    from ..evaluation import LayerSkipLM

    if args.exit_layer == "auto":
        raise ValueError("--exit-layer is auto, but an early exit is after a number of layers; give it")
    given = options.drafting(args, model)
    names = ("exit_layer", "num_speculations", "draft_source")
    complete = RequestDefaults(**{name: given.pop(name, None) for name in names}).complete()
    drafting = LayerSkipLM(
        model, complete.exit_layer, complete.num_speculations, tokenizer=tokenizer, draft_source=complete.draft_source,
        **given,
    )  # fmt: skip
    adapted, exit_layer = drafting.decoder.model, drafting.decoder.exit_layer
    is_shipped = args.exit is None and adapted.exit_layer is not None
    if is_shipped or not isinstance(exit_layer, int):  # the early exit is evaluated without the trained exit
        exit_layer = max(1, adapted.num_layers // 4)
    early, full = LayerSkipLM(model, exit_layer, tokenizer=tokenizer), LayerSkipLM(model, tokenizer=tokenizer)
    return {FULL: full, EARLY: early, DRAFTED: drafting}


def _cache(args: argparse.Namespace, settings: Record) -> Path:
    """The folder of the answers so far, which must be of the same model and drafts."""
    folder: Path = args.output.with_name(f"{args.output.name}.partial")
    path = folder / "settings.json"
    if folder.exists() and not path.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} was not written by this command; move it away, or give another output")
    if args.overwrite and folder.is_dir():
        shutil.rmtree(folder)
    if path.exists() and (changed := differences(json.loads(path.read_bytes()), settings)):
        raise ValueError(f"{folder} holds answers of other work: {changed}; --overwrite begins anew")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings).encode())
    return folder


def _evaluate(args: argparse.Namespace, model: Any, task: Record, cache: Path) -> Record:
    """Run lm-eval on a task or group: on --limit documents of each of its tasks, spread over all."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    leaves = task["tasks"]
    sizes = {name: len(leaf.eval_docs) for name, leaf in leaves.items()}
    limits = {name: min(args.limit or size, size) for name, size in sizes.items()}
    chat = all((leaf.config.metadata or {}).get("chat") for leaf in leaves.values())
    inner = {child for children in task["group_map"].values() for child in children}
    try:
        report: Record = simple_evaluate(
            model,
            tasks=[one for name, one in {**leaves, **task["groups"]}.items() if name not in inner],
            samples={name: [n * size // limits[name] for n in range(limits[name])] for name, size in sizes.items()},
            gen_kwargs={"max_gen_toks": args.max_new_tokens} if args.max_new_tokens else None,
            apply_chat_template=chat and model.tokenizer.chat_template is not None,
            confirm_run_unsafe_code=args.run_code,
            use_cache=str(cache),
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
    except KeyboardInterrupt:
        answers = model.cache_hook.dbdict
        kept = f"{0 if answers is None else len(answers)} answers ({cache.name}) are in {cache.parent}"
        raise KeyboardInterrupt(f"interrupted; {kept}, the same command continues there") from None
    finally:
        if model.cache_hook.dbdict is not None:
            model.cache_hook.dbdict.close()
            model.cache_hook.dbdict = None
    return report


def record_of(task: str, strategy: str, sample: Record) -> Record:
    """An answer as the report has it, of a sample of lm-eval."""
    texts = [text for responses in sample["resps"] for text in responses if hasattr(text, "stats")]
    return {
        "task": task,
        "strategy": strategy,
        "kind": sample["doc"].get("kind"),
        **{key: value for key, value in sample.items() if key not in ("doc", "arguments", "resps")},
        "texts": texts,
        "greedy tokens": [text.tokens for text in texts if text.greedy],
        "decoding": {key: sum(text.stats[key] for text in texts) for key in (texts[0].stats if texts else ())},
    }


def summarize(scores: Record, answers: list[Record]) -> Record:
    """The scores of a task with one strategy, and what its answers took, also by kind of question."""
    names = [name for name in scores if "," in name and "_stderr," not in name and not name.startswith("bypass,")]
    answers = [one for one in answers if one["filter"] == answers[0]["filter"]]  # each filter repeats the answers
    kinds = dict.fromkeys(one["kind"] for one in answers)
    return {
        "scores": {name.removesuffix(",none"): scores[name] for name in names},
        **decoding_of(answers),
        "by_kind": {kind: decoding_of([one for one in answers if one["kind"] == kind]) for kind in kinds if kind},
    }


def decoding_of(answers: list[Record]) -> Record:
    """The counts and rates of generated answers."""
    result: Record = {"questions": len(answers)}
    all_stats = [one["decoding"] for one in answers if one["decoding"]]
    if all_stats:
        total = {key: sum(stats[key] for stats in all_stats) for key in all_stats[0]}
        tokens, rounds = total["tokens"], total["rounds"]
        result |= {"tokens": tokens, "tokens_per_second": tokens / total["seconds"] if tokens else 0.0}
        if total["drafted"]:
            result["drafts_accepted"] = total["accepted"] / total["drafted"]
            result |= {"accepted_a_round": total["accepted"] / rounds, "tokens_a_round": tokens / rounds}
    return result


def differing(answers: list[Record]) -> list[str]:
    """The greedy answers of self-speculation whose tokens are not those of the full depth."""
    tokens = {(one["task"], one["doc_id"], one["strategy"]): one["greedy tokens"] for one in answers}
    return [
        f"{task} {question}"
        for (task, question, strategy), found in tokens.items()
        if strategy == DRAFTED and found != tokens[task, question, FULL]
    ]


def tables(results: dict[str, dict[str, Record]]) -> Iterator[Table]:
    """A table of scores with a column for each strategy, and one of speeds and drafts."""
    scores = [
        [name, score, *(_cell(found.get(strategy, {}).get("scores", {}), score, ".6g") for strategy in STRATEGIES)]
        for name, found in results.items()
        for score in found[FULL]["scores"]
    ]
    speeds = [
        [label, *(_cell(part.get(strategy, {}), "tokens_per_second", ".1f") for strategy in STRATEGIES),
         _cell(part[DRAFTED], "drafts_accepted", ".0%"), _cell(part[DRAFTED], "accepted_a_round", ".2f"),
         _cell(part[DRAFTED], "tokens_a_round", ".2f")]
        for name, found in results.items()
        if "tokens" in found[FULL]
        for label, part in [
            (f"{name} ({found[FULL]['questions']})", found),
            *((f"  {kind}", {one: found[one]["by_kind"][kind] for one in found}) for kind in found[FULL]["by_kind"]),
        ]
    ]  # fmt: skip
    drafts = ("drafts accepted", "accepted a round", "tokens a round")
    for columns, rows in (("scores", "", *HEADS), scores), (("tokens/s", *HEADS, *drafts), speeds):
        if rows:
            table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
            table.add_column(columns[0], no_wrap=True)
            for column in columns[1:]:
                table.add_column(column, justify="right")
            for row in rows:
                table.add_row(*row)
            yield table


def _cell(values: Record, key: str, form: str) -> str:
    return format(values[key], form) if isinstance(values.get(key), float) else str(values.get(key, ""))
