"""Train an exit that drafts for a frozen model: what the model makes of texts is computed once, and then learned."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from .._files import write_atomically
from . import arguments

if TYPE_CHECKING:
    from ..training.exit_run import ExitRun
    from ..training.exit_trainer import ExitTrainer, State
    from ..training.output_dir import ExitOutput


def run(args: argparse.Namespace, console: Console) -> int:
    """Train, keeping the best. Of several processes only the first prints and writes."""
    from ..training import processes, recipe
    from ..training.output_dir import ExitOutput

    processes.check_device(args.device)
    console = console if processes.first() else Console(quiet=True)
    given = {key: getattr(args, key) for key in recipe.KEYS if getattr(args, key, None) is not None}
    recipe = recipe.exit_recipe(args.recipe, given)
    arguments.tasks((*recipe.texts, *recipe.eval_texts, *recipe.prompts))
    arguments._check_model(recipe.model)
    output = ExitOutput(recipe)
    if args.resume:
        output.check_resumed()
        if output.finished:
            console.print(f"this run is finished, nothing is left to train; it wrote {output.exit}", soft_wrap=True)
            return 0
    else:
        output.check_new(args.overwrite)
    try:
        trained = _train(args, console, output)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(output)) from None
    if processes.first():
        _report(console, trained.state, output)
    return 0


def _train(args: argparse.Namespace, console: Console, output: ExitOutput) -> ExitTrainer:
    from ..training import processes
    from . import options

    options.settle(args)
    options.quiet_transformers()
    from ..training.exit_run import ExitRun

    with processes.joined(args.device) as device:
        with Console(stderr=True, quiet=console.quiet).status(f"loading {output.recipe.model}"):
            work = ExitRun(output.recipe, device)
            data = work.data
        if args.resume:
            output.check_same_data(data)
        processes.wait()  # all have looked before one changes what is there
        if processes.first() and not args.resume:
            output.begin(data)
        with _bar(console) as progress:
            trainer = _prepare(work, progress)
            if args.resume and output.checkpoint.exists():
                trainer.load(output.checkpoint)
            processes.wait()  # all have read it before one removes it
            _learn(trainer, output, progress)
    return trainer


def _bar(console: Console) -> Progress:
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=console)


def _prepare(work: ExitRun, progress: Progress) -> ExitTrainer:
    shown = progress.add_task("running the model", total=None, note="texts")
    return work.trainer(lambda done, of: progress.update(shown, completed=done, total=of))


def _learn(trainer: ExitTrainer, output: ExitOutput, progress: Progress) -> None:
    from ..training import processes
    from ..training.exit_run import curve, found

    recipe, state = output.recipe, trainer.state
    shown = progress.add_task("training the exit", total=1, note="")

    def stepped(state: State, loss: float) -> None:
        part = state.step / recipe.steps if recipe.steps else min(1.0, state.seconds / (60 * recipe.minutes))
        progress.update(shown, completed=part, note=f"step {state.step}, loss {loss:.3f}")

    def evaluated(best: bool) -> None:
        if not processes.first():
            return
        if best:
            output.save_exit(trainer.module.exit())
        trainer.save(output.checkpoint)
        write_atomically(output.curve, curve(trainer.state.history))
        progress.console.print(_line(trainer.state.history[-1], best), highlight=False, soft_wrap=True)

    if state.step:
        progress.console.print(f"going on from step {state.step}")
    trainer.train(stepped, evaluated)
    if processes.first():
        output.finish(found(trainer.state))


def _line(entry: dict[str, Any], best: bool) -> str:
    """An evaluation: agreement of all rows, of each draft of a round where those before it agreed, and sampled."""
    parts = [f"{name} {_agreement(one)}" for name, one in entry["held out"].items()]
    mark = ", the best" if best else ""
    return f"step {entry['step']}  loss {entry['loss']:.4f}  {'  '.join(parts)}{mark}"


def _agreement(one: dict[str, Any]) -> str:
    positions = "/".join(f"{position:.0%}" for position in one["positions"])
    return f"{one['all']:.1%} ({positions}), sampled {one['sampled']:.1%}"


def _report(console: Console, state: State, output: ExitOutput) -> None:
    why = "ended early, since nothing got better" if state.stopped_early else "trained"
    console.print(
        f"{why}: {state.step} steps in {state.seconds:.0f} s; wrote the exit of step {state.best_step} to "
        f"{output.exit}, the learning curve to {output.curve}", soft_wrap=True,
    )  # fmt: skip
    for name, one in output.record["found"]["held out"].items():
        console.print(f"{name}: agreement {_agreement(one)}, {one['tokens_per_round']:.2f} tokens a round")


def _how_to_go_on(output: ExitOutput) -> str:
    from ..training.output_dir import ExitOutput

    if not ExitOutput(output.recipe).record:
        return "interrupted, before anything was written"
    return f"interrupted; the same command with --resume goes on from what is in {output.folder}"
