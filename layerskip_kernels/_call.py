"""How the public functions reach an op."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks, dispatch

_op = torch.ops.layerskip


def call(op: str, *args: Any) -> Any:
    """Run an op that has no backward.

    What the native CPU library serves goes straight to it: in a cold cache the checks and two dispatcher hops take as
    long as a small kernel. The library checks what it needs; where it refuses, `_checks` finds the words.
    """
    first = args[0]
    if torch.is_grad_enabled() and first.requires_grad:
        raise ValueError(f"{op} has no backward; call it under torch.no_grad(), or detach its inputs")
    kernel = None if torch.compiler.is_compiling() else dispatch.direct(op, first)
    if kernel is None:
        return getattr(_op, op).default(*args)
    try:
        return kernel(*args)
    except RuntimeError as error:
        getattr(_checks, op)(*args)
        where = str(error).splitlines()[0]
        if "csrc/cpu/" not in where and "csrc/common/" not in where:  # torch's own: memory that cannot be had, say
            raise
        raise ValueError(str(error).splitlines()[0].split(", ", 2)[-1]) from error  # less "function, file:line"
