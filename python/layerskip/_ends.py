"""Run a command: errors become one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from ._imports import EXTRAS

# User errors, exit code 2. Any other error is a failure, exit code 1.
MISUSE = (
    ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError, BlockingIOError,
)  # fmt: skip


def declare(parser: argparse.ArgumentParser, **options: object) -> None:
    """Add ``--traceback`` to a parser."""
    parser.add_argument("--traceback", action="store_true", help="show where an error came from", **options)  # type: ignore[arg-type]


def run(name: str, work: Callable[[], int | None], traceback: bool = False, training: bool = False) -> int:
    """Run the work of a command and return its exit code.

    Parameters
    ----------
    name : str
        The command; its errors begin with the name.
    work : callable
        Returns the exit code, or None for 0.
    traceback : bool
        Raise errors instead of printing them.
    training : bool
        Whether a missing package belongs to the extra ``train``.

    Returns
    -------
    int
        0 success; 1 a check or the work failed; 2 user error; 130 interrupted.
    """
    errors = Console(stderr=True)
    try:
        with warnings.catch_warnings():
            for other in ("accelerate", "peft", "transformers"):  # their advice would run through the output
                warnings.filterwarnings("ignore", module=other)
            return work() or 0
    except KeyboardInterrupt as stop:  # its message says what was saved
        errors.print(escape(str(stop) or "interrupted"), highlight=False, soft_wrap=True)
        return 130
    except Exception as error:
        if traceback:
            raise
        line = escape(_one_line(error, training))
        errors.print(f"[red]{escape(name)}:[/red] {line}", highlight=False, soft_wrap=True)
        return 2 if _is_misuse(error) else 1


def module(name: str, main: Callable[[Sequence[str]], int | None]) -> int:
    """Run ``main`` of ``python -m name`` on the arguments of this process; its parser takes ``--traceback``."""
    words = sys.argv[1:]
    return run(f"python -m {name}", lambda: main(words), "--traceback" in words)


def _is_misuse(error: Exception) -> bool:
    if isinstance(error, MISUSE):
        return True
    from layerskip_kernels import BackendError  # imports torch

    return isinstance(error, BackendError)


def _one_line(error: Exception, training: bool) -> str:
    """The message; how to install a missing package; for unexpected errors, how to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = "train" if training else EXTRAS[error.name]
        return f'{message}: pip install "layerskip-kernels[{extra}]"'
    name = type(error).__name__
    if _is_misuse(error) or isinstance(error, (OSError, FloatingPointError)):
        return message or name
    return f"{name}: {message} (--traceback shows where)" if message else f"{name} (--traceback shows where)"
