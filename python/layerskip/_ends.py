"""How a command ends: an error is one line on stderr, and the exit code says whose it is."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from ._imports import EXTRAS

# What was asked for cannot be: another call may. Any other error is a failure of what could be.
MISUSE = (
    ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError, BlockingIOError,
)  # fmt: skip


def declare(parser: argparse.ArgumentParser, **options: object) -> None:
    """Let a parser take ``--traceback``."""
    parser.add_argument("--traceback", action="store_true", help="show where an error came from", **options)  # type: ignore[arg-type]


def run(name: str, work: Callable[[], int | None], traceback: bool = False, training: bool = False) -> int:
    """Do the work of a command.

    Parameters
    ----------
    name : str
        Of the command; its errors begin with it.
    work : callable
        Returns the exit code; None is 0.
    traceback : bool
        Let errors through.
    training : bool
        Whether a package that is missing is one that training needs.

    Returns
    -------
    int
        0 if all is well; 1 if a check or the work failed; 2 if the command was given what cannot be; 130 if it was
        interrupted.
    """
    errors = Console(stderr=True)
    try:
        with warnings.catch_warnings():
            for other in ("accelerate", "peft", "transformers"):  # what they advise would run through the output
                warnings.filterwarnings("ignore", module=other)
            return work() or 0
    except KeyboardInterrupt as stop:  # a command that was stopped says what there is of its work
        errors.print(escape(str(stop) or "interrupted"), highlight=False, soft_wrap=True)
        return 130
    except Exception as error:
        if traceback:
            raise
        line = escape(_one_line(error, training))
        errors.print(f"[red]{escape(name)}:[/red] {line}", highlight=False, soft_wrap=True)
        return 2 if _is_misuse(error) else 1


def module(name: str, main: Callable[[Sequence[str]], int | None]) -> int:
    """Run ``main`` of ``python -m name``, whose parser has `declare`, on this process's arguments."""
    words = sys.argv[1:]
    return run(f"python -m {name}", lambda: main(words), "--traceback" in words)


def _is_misuse(error: Exception) -> bool:
    if isinstance(error, MISUSE):
        return True
    from layerskip_kernels import BackendError  # which takes torch, so only now

    return isinstance(error, BackendError)


def _one_line(error: Exception, training: bool) -> str:
    """What went wrong; of a package that is missing, how to get it; of what nobody foresaw, how to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = "train" if training else EXTRAS[error.name]
        return f'{message}: pip install "layerskip-kernels[{extra}]"'
    name = type(error).__name__
    if _is_misuse(error) or isinstance(error, (OSError, FloatingPointError)):
        return message or name
    return f"{name}: {message} (--traceback shows where)" if message else f"{name} (--traceback shows where)"
