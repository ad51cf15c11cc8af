"""Show what was measured as one page of HTML: the texts with the source of every token, plots, tables."""

from __future__ import annotations

import argparse

from rich.console import Console

from .._files import check_output, write_atomically
from . import page


def run(args: argparse.Namespace, console: Console) -> int:
    """Read, draw, write."""
    check_output(args.output, args.overwrite)
    measured = [page.read(path) for path in args.files]
    write_atomically(args.output, page.page(measured).encode())
    console.print(f"wrote {args.output}", highlight=False, soft_wrap=True)
    return 0
