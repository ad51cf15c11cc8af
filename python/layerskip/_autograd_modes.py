"""Autograd's modes, restored wherever a call is interrupted.

``__exit__`` of `torch.no_grad` and `torch.inference_mode` is Python code. A signal handler that raises, such as that of
Ctrl-C, may leave it before it has restored anything; then no tensor of the process requires a gradient any more. Python
handles no signal between the end of a ``with`` block and an ``__exit__`` in C++.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

InferenceMode: Callable[[bool], AbstractContextManager[None]] = torch._C._InferenceMode
"""The guard in C++ that `torch.inference_mode` wraps. On exit it restores the grad mode, too."""


def keeps_grad_mode(call: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a function that raises leave the grad mode as it was. A signal may lose what the function returns."""

    @functools.wraps(call)
    def wrapped(*args: Parameters.args, **named: Parameters.kwargs) -> Result:
        grad_enabled = torch.is_grad_enabled()
        try:
            return call(*args, **named)
        except BaseException:
            torch._C._set_grad_enabled(grad_enabled)  # not torch.set_grad_enabled, which is Python code, too
            raise

    return wrapped
