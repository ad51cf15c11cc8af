"""The ``layerskip`` command.

What a command takes is declared in `arguments`; what it does is ``run(args, console) -> int`` in the module of its
name, which is imported once the arguments are understood and what they name is there.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console
from rich.markup import escape

from .._extras import EXTRAS
from . import arguments, names

__all__ = ["main"]

# What was asked for cannot be: another call may. Any other error is a failure of what could be.
MISUSE = (
    ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError, BlockingIOError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its errors are one line on stderr.

    Returns
    -------
    int
        0 if all is well; 1 if a check or the work failed; 2 if the command was given what cannot be; 130 if it was
        interrupted.
    """
    args = arguments.parse(argv)
    errors = Console(stderr=True)
    try:
        names.check(args)
        with warnings.catch_warnings():
            for other in ("accelerate", "peft", "transformers"):  # what they advise would run through the output
                warnings.filterwarnings("ignore", module=other)
            module = import_module(f".{args.command.replace('-', '_')}", __package__)
            code: int = module.run(args, Console())
        return code
    except KeyboardInterrupt as stop:  # a command that was stopped says what there is of its work
        errors.print(escape(str(stop) or "interrupted"), highlight=False, soft_wrap=True)
        return 130
    except Exception as error:
        if args.traceback:
            raise
        errors.print(
            f"[red]layerskip {args.command}:[/red] {escape(_one_line(error, args))}", highlight=False, soft_wrap=True
        )
        return 2 if _is_misuse(error) else 1


def _is_misuse(error: Exception) -> bool:
    if isinstance(error, MISUSE):
        return True
    from layerskip_kernels import BackendError  # which takes torch, so only now

    return isinstance(error, BackendError)


def _one_line(error: Exception, args: argparse.Namespace) -> str:
    """What went wrong; of a package that is missing, how to get it; of what nobody foresaw, how to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = "train" if args.command.startswith("train") else EXTRAS[error.name]
        return f'{message}: pip install "layerskip-kernels[{extra}]"'
    name = type(error).__name__
    if _is_misuse(error) or isinstance(error, (OSError, FloatingPointError)):
        return message or name
    return f"{name}: {message} (--traceback shows where)" if message else f"{name} (--traceback shows where)"
