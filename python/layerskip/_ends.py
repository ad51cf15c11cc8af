"""Exit codes of commands, and errors and warnings as one line on stderr."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from ._imports import EXTRAS, printable

# User errors, exit code 2.
MISUSE = (
    ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    PermissionError, BlockingIOError,
)  # fmt: skip


def declare(parser: argparse.ArgumentParser, **options: object) -> None:
    """Add the option ``--traceback``."""
    parser.add_argument("--traceback", action="store_true", help="show where an error came from", **options)  # type: ignore[arg-type]


def run(name: str, work: Callable[[], int | None], traceback: bool = False, training: bool = False) -> int:
    """Run a command, and print errors and warnings as one line that begins with ``name``.

    With ``traceback``, exceptions propagate, and warnings have their place. With ``training``, a missing package's hint
    names the extra for training. Returns the result of ``work`` (None is 0), 1 for a failure or, without a message, if
    the reader of a pipe is gone, 2 for a user error, or 130 if interrupted.
    """
    errors = Console(stderr=True)

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        line = escape(printable(" ".join(str(message).split())))
        errors.print(f"[yellow]{escape(name)}:[/yellow] {line}", highlight=False, soft_wrap=True)

    try:
        with warnings.catch_warnings():
            if not traceback:
                warnings.showwarning = show
            for other in ("accelerate", "peft", "transformers"):  # their advice would clutter the output
                warnings.filterwarnings("ignore", module=other)
            return work() or 0
    except KeyboardInterrupt as stop:  # its message says what was done
        errors.print(escape(str(stop) or "interrupted"), highlight=False, soft_wrap=True)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _closed(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it exits
            return 1
        if traceback:
            raise
        line = escape(_one_line(error, training))
        errors.print(f"[red]{escape(name)}:[/red] {line}", highlight=False, soft_wrap=True)
        return 2 if _is_misuse(error) else 1


def _closed(stream: TextIO) -> bool:
    """Whether it is a pipe whose reader is gone."""
    try:
        watched = select.poll()
        watched.register(stream.fileno(), 0)
    except io.UnsupportedOperation:
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


def module(name: str, main: Callable[[Sequence[str]], int | None]) -> int:
    """Run ``main`` of ``python -m name`` on this process's arguments; its parser must have `declare`."""
    words = sys.argv[1:]
    return run(f"python -m {name}", lambda: main(words), "--traceback" in words)


def _is_misuse(error: Exception) -> bool:
    if isinstance(error, MISUSE):
        return True
    from layerskip_kernels import BackendError  # imports torch

    return isinstance(error, BackendError)


def _one_line(error: Exception, training: bool) -> str:
    """The message; for a missing package how to install it, for an unexpected error how to see the traceback."""
    message = printable(" ".join(str(error).split()))
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = "train" if training else EXTRAS[error.name]
        return f'{message}: pip install "layerskip-kernels[{extra}]"'
    name = type(error).__name__
    if _is_misuse(error) or isinstance(error, (OSError, FloatingPointError)):
        return message or name
    return f"{name}: {message} (--traceback shows where)" if message else f"{name} (--traceback shows where)"
