"""The ``layerskip`` command.

`arguments` declares what a command takes; a module of the command's name does the work. It is imported once the
arguments are valid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

from .. import _ends
from . import arguments

__all__ = ["main"]
PIPED_WIDTH = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one line on stderr."""
    args = arguments.parse(argv)

    def work() -> int:
        arguments.validate_names(args)
        module = import_module(f".{args.command.partition('-')[0]}", __package__)
        run = module.run_exit if args.command == "train-exit" else module.run
        # Piped text is for files and programs, not for the 80 columns that rich assumes.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
        code: int = run(args, Console(width=width))
        return code

    return _ends.run(f"layerskip {args.command}", work, args.traceback, training=args.command.startswith("train"))
