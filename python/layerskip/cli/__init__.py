"""The ``layerskip`` command. A command is a module with ``add_arguments(parser)`` and ``run(args, console) -> int``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from layerskip_kernels import BackendError

from . import bench, correctness, demo, distill, env, exits, export, generate, train

COMMANDS = {
    "demo": (demo, "decode a few prompts both ways, side by side"),
    "generate": (generate, "continue a prompt"),
    "bench": (bench, "measure decoding against the memory's speed and against transformers"),
    "correctness": (correctness, "check that self-speculative decoding changes no token"),
    "train": (train, "train early exits into a model, by a recipe"),
    "distill": (distill, "let a model write the pairs that its early exits learn from"),
    "exits": (exits, "show how good every layer's exit is, to choose the exit layer by"),
    "export": (export, "write the first layers as a draft model for other engines, or a model for vLLM's plugin"),
    "env": (env, "show versions, devices, and which backend serves each op"),
}
# The extra that installs what is imported only when a command needs it.
EXTRAS = {
    "transformers": "demo", "safetensors": "demo", "matplotlib": "demo",
    "accelerate": "train", "peft": "train", "yaml": "train",
}  # fmt: skip
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, BackendError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="layerskip", description="Early exit and self-speculative decoding.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(subparser)
    return parser


def _one_line(error: Exception, command: str) -> str:
    """What went wrong; of a package that is missing, how to get it."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = "train" if command == "train" else EXTRAS[error.name]
        return f'{message}: pip install "layerskip-kernels[{extra}]"'
    return message


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a check failed, 2 for an error, which is one line on stderr."""
    args = _parser().parse_args(argv)
    errors = Console(stderr=True)
    try:
        return COMMANDS[args.command][0].run(args, Console())
    except USER_ERRORS as error:
        if args.traceback:
            raise
        message = escape(_one_line(error, args.command))
        errors.print(f"[red]layerskip {args.command}:[/red] {message}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt as stop:  # a command that was stopped says what there is of its work
        errors.print(escape(str(stop) or "interrupted"), highlight=False, soft_wrap=True)
        return 130
