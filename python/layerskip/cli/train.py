"""Train early exits into a model (``train``), or an exit that drafts for a frozen model (``train-exit``)."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from .. import registry
from .._files import write_atomically
from .arguments import check_device_of_process, check_tasks, is_main_process

if TYPE_CHECKING:
    from ..training.exit_run import ExitRun
    from ..training.exit_trainer import ExitTrainer, ExitTrainerState
    from ..training.output_dir import ExitOutput, Output


def run(args: argparse.Namespace, console: Console) -> int:
    """Train early exits into a model, and write the result."""
    from ..training import recipe as recipes

    overrides = _overrides(args.set)
    recipe = recipes.read_recipe(args.recipe, overrides) if args.recipe else recipes.make_recipe(overrides)
    check_tasks((*recipe.tasks, *recipe.replay.tasks))
    registry.check_model(recipe.model)
    # imports torch, so only once the recipe is checked
    from ..training.output_dir import Output, last_checkpoint, locked

    with locked(recipe) if is_main_process() else nullcontext():
        output = Output(recipe)
        if not args.resume:
            output.check_new(args.overwrite)
            return _train(args, console, output)
        checkpoint = last_checkpoint(output.folder)
        if checkpoint is None and not output.finished:
            raise ValueError(f"there is no whole checkpoint in {output.folder} to resume from")
        output.check_resumed()
        if not output.finished:
            return _train(args, console, output, checkpoint)
        if is_main_process():
            _print_finished(console, *output.results)
        return 0


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
        if inner:
            values.setdefault(outer, {})[inner] = yaml.safe_load(text)
        else:
            values[outer] = yaml.safe_load(text)
    return values


def _print_finished(console: Console, *results: Path) -> None:
    written = ", ".join(map(str, results))
    console.print(f"this run is finished, nothing is left to train; it wrote {written}", soft_wrap=True)


def _train(args: argparse.Namespace, console: Console, output: Output, checkpoint: Path | None = None) -> int:
    """Train from the start, or from a checkpoint."""
    from . import options

    check_device_of_process(args.device)
    options.set_device(args)
    options.quiet_transformers()
    from ..training import run as runs
    from ..training.output_dir import last_checkpoint
    from ..training.trainer import Progress

    first = is_main_process()
    trainer = runs.make_trainer(output.recipe, args.device, callbacks=[Progress(console)] if first else [])
    data = runs.seen_data(trainer)
    if checkpoint is not None:
        output.check_same_data(data)
    trainer.accelerator.wait_for_everyone()  # every process has checked before one changes the directory
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
        last = last_checkpoint(output.folder)
        kept = f"; the same command with --resume continues from {last}" if last else ", before the first checkpoint"
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    trainer.accelerator.end_training()  # leaves the process group, without which gloo may abort at exit
    return 0


def run_exit(args: argparse.Namespace, console: Console) -> int:
    """Train an exit for a frozen model, and keep the best. Of several processes only the first prints and writes."""
    from ..training import recipe as recipes

    check_device_of_process(args.device)
    console = console if is_main_process() else Console(quiet=True)
    given = {key: getattr(args, key) for key in recipes.KEYS if getattr(args, key, None) is not None}
    recipe = recipes.exit_recipe(args.recipe, given)
    check_tasks((*recipe.texts, *recipe.eval_texts, *recipe.prompts))
    registry.check_model(recipe.model)
    from ..training.output_dir import ExitOutput, locked  # imports torch, so only once the recipe is checked

    with locked(recipe) if is_main_process() else nullcontext():
        output = ExitOutput(recipe)
        if args.resume:
            output.check_resumed()
            if output.finished:
                _print_finished(console, output.exit)
                return 0
        else:
            output.check_new(args.overwrite)
        try:
            trained = _train_exit(args, console, output)
        except KeyboardInterrupt:
            if not ExitOutput(recipe).record:  # which only the first process has written
                raise KeyboardInterrupt("interrupted, before anything was written") from None
            kept = f"the same command with --resume continues from {output.folder}"
            raise KeyboardInterrupt(f"interrupted; {kept}") from None
        if is_main_process():
            _print_result(console, trained.state, output)
    return 0


def _train_exit(args: argparse.Namespace, console: Console, output: ExitOutput) -> ExitTrainer:
    from . import options

    options.set_device(args)
    options.quiet_transformers()
    from accelerate import PartialState

    from ..training.exit_run import ExitRun

    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    processes = PartialState(cpu=args.device.type == "cpu")
    device = processes.device if processes.num_processes > 1 else args.device
    try:
        with Console(stderr=True, quiet=console.quiet).status(f"loading {output.recipe.model}"):
            work = ExitRun(output.recipe, device)
            data = work.data
        if args.resume:
            output.check_same_data(data)
        processes.wait_for_everyone()  # every process has checked before one changes the directory
        if is_main_process() and not args.resume:
            output.begin(data)
        with Progress(*columns, console=console) as progress:
            trainer = _prepare(work, progress)
            if args.resume and output.checkpoint.exists():
                trainer.load(output.checkpoint)
            processes.wait_for_everyone()  # every process has read it before one removes it
            _fit(trainer, output, progress)
    finally:
        processes.destroy_process_group()  # without it gloo may abort at exit
    return trainer


def _prepare(work: ExitRun, progress: Progress) -> ExitTrainer:
    task = progress.add_task("running the model", total=None, note="texts")
    return work.trainer(lambda done, total: progress.update(task, completed=done, total=total))


def _fit(trainer: ExitTrainer, output: ExitOutput, progress: Progress) -> None:
    from ..training.exit_run import best_figures, curve

    recipe, state = output.recipe, trainer.state
    task = progress.add_task("training the exit", total=1, note="")

    def stepped(state: ExitTrainerState, loss: float) -> None:
        part = state.step / recipe.steps if recipe.steps else min(1.0, state.seconds / (60 * recipe.minutes))
        progress.update(task, completed=part, note=f"step {state.step}, loss {loss:.3f}")

    def evaluated(best: bool) -> None:
        if not is_main_process():
            return
        if best:
            output.save_exit(trainer.module.exit())
        trainer.save(output.checkpoint)
        write_atomically(output.curve, curve(trainer.state.history))
        entry = trainer.state.history[-1]
        parts = "  ".join(f"{name} {_agreement(one)}" for name, one in entry["held out"].items())
        line = f"step {entry['step']}  loss {entry['loss']:.4f}  {parts}{', the best' if best else ''}"
        progress.console.print(line, highlight=False, soft_wrap=True)

    if state.step:
        progress.console.print(f"continuing from step {state.step}")
    trainer.train(stepped, evaluated)
    if is_main_process():
        output.finish(best_figures(trainer.state))


def _agreement(one: dict[str, Any]) -> str:
    """Agreement of all rows, of each draft token of a round if those before it agreed, and sampled."""
    positions = "/".join(f"{position:.0%}" for position in one["positions"])
    return f"{one['all']:.1%} ({positions}), sampled {one['sampled']:.1%}"


def _print_result(console: Console, state: ExitTrainerState, output: ExitOutput) -> None:
    how = "stopped early without further improvement" if state.stopped_early else "trained"
    console.print(
        f"{how}: {state.step} steps in {state.seconds:.0f} s; wrote the exit of step {state.best_step} to "
        f"{output.exit}, the learning curve to {output.curve}", soft_wrap=True,
    )  # fmt: skip
    for name, one in output.record["found"]["held out"].items():
        console.print(f"{name}: agreement {_agreement(one)}, {one['tokens_per_round']:.2f} tokens a round")
