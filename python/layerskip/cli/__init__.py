"""The ``layerskip`` command.

What a command takes is declared in `arguments`; what it does is ``run(args, console) -> int`` in the module of its
name, which is imported once the arguments are understood and what they name is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

from .. import _ends
from . import arguments

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its errors are one line on stderr, and the exit code is that of `_ends.run`."""
    args = arguments.parse(argv)

    def work() -> int:
        arguments.validate_names(args)
        module = import_module(f".{args.command.replace('-', '_')}", __package__)
        code: int = module.run(args, Console())
        return code

    return _ends.run(f"layerskip {args.command}", work, args.traceback, training=args.command.startswith("train"))
