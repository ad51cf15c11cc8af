"""Train early exits: a recipe in YAML, single keys of it set on the command line."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("recipe", nargs="?", type=Path, help="a YAML file; without one every key has its default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe, e.g. steps=100"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in the output")
    parser.add_argument(
        "--threads", type=options.positive, help="how many CPU threads to use (default: torch's choice)"
    )


def _overrides(pairs: list[str]) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = {}
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
    import torch

    from ..training import recipe as recipes
    from ..training import run as runs
    from ..training.progress import Progress

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    overrides = _overrides(args.set)
    recipe = recipes.read_recipe(args.recipe, overrides) if args.recipe else recipes.make_recipe(overrides)
    quiet = int(os.environ.get("RANK", "0")) != 0
    checkpoint = runs.last_checkpoint(Path(recipe.output)) if args.resume else None
    if args.resume and checkpoint is None:
        raise ValueError(f"there is no whole checkpoint in {recipe.output} to resume from")
    trainer = runs.make_trainer(recipe, callbacks=[] if quiet else [Progress(console)])
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    if not quiet:
        paths = runs.save_result(trainer, recipe)
        written = ", ".join(str(path) for path in paths)
        console.print(f"trained in {time.perf_counter() - start:.0f} s; wrote {written}")
    trainer.accelerator.end_training()  # leaves the process group, without which gloo may abort at exit
    return 0
