"""Train early exits: a recipe in YAML, single keys of it set on the command line."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from . import arguments

if TYPE_CHECKING:
    from ..training.output_dir import Output


def _overrides(pairs: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if not pairs:
        return values
    import yaml

    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
        outer, _, inner = key.partition(".")
        value = yaml.safe_load(text)
        if inner:
            values.setdefault(outer, {})[inner] = value
        else:
            values[outer] = value
    return values


def run(args: argparse.Namespace, console: Console) -> int:
    """Train, and write the result."""
    from ..training import recipe as recipes

    overrides = _overrides(args.set)
    recipe = recipes.read_recipe(args.recipe, overrides) if args.recipe else recipes.make_recipe(overrides)
    arguments.tasks((*recipe.tasks, *recipe.replay.tasks))
    arguments._check_model(recipe.model)
    from ..training.output_dir import Output  # imports torch

    output = Output(recipe)
    if not args.resume:
        output.check_new(args.overwrite)
        return _train(args, console, output)
    checkpoint = output.check_resumed()
    if output.finished:
        from ..training import processes

        if processes.first():
            written = ", ".join(map(str, output.results))
            console.print(f"this run is finished, nothing is left to train; it wrote {written}", soft_wrap=True)
        return 0
    return _train(args, console, output, checkpoint)


def _train(args: argparse.Namespace, console: Console, output: Output, checkpoint: Path | None = None) -> int:
    """Train from the start, or from a checkpoint."""
    from ..training import processes
    from . import options

    processes.check_device(args.device)
    options.settle(args)
    options.quiet_transformers()
    from ..training import run as runs
    from ..training.trainer import Progress

    first = processes.first()
    trainer = runs.make_trainer(output.recipe, args.device, callbacks=[Progress(console)] if first else [])
    data = runs.seen_data(trainer)
    if checkpoint is not None:
        output.check_same_data(data)
    trainer.accelerator.wait_for_everyone()  # all have looked before one changes what is there
    if first and checkpoint is None:
        output.begin(data)
    trainer.accelerator.wait_for_everyone()
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        if first:
            paths = runs.save_result(trainer, output.recipe)
            output.finish()
            written = ", ".join(str(path) for path in paths)
            console.print(f"trained in {time.perf_counter() - start:.0f} s; wrote {written}", soft_wrap=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(output)) from None
    trainer.accelerator.end_training()  # leaves the process group, without which gloo may abort at exit
    return 0


def _how_to_go_on(output: Output) -> str:
    from ..training.output_dir import last_checkpoint

    checkpoint = last_checkpoint(output.folder)
    if checkpoint is None:
        return "interrupted, before the first checkpoint"
    return f"interrupted; the same command with --resume goes on from {checkpoint}"
