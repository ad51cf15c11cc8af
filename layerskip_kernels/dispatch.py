"""Chooses the implementation that serves a call of an op.

PyTorch's dispatcher picks the device; a table picks among the implementations on it. ``supports(*args)`` of an
implementation returns None if it serves the call, or the reason why not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks
from ._ops import ops
from .schemas import bind

BACKENDS = ("cuda", "triton", "cpu", "reference")
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
# The prefix of argument errors from the compiled libraries (common/checks.h): the stable ABI turns every C++ exception
# into a RuntimeError.
REFUSAL = "layerskip: "


def _serves_all(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """A function that computes an op, and whether it serves given arguments.

    With ``checks`` the function checks its arguments itself; `_checks` runs only after an error, for the message.
    """

    function: Callable[..., Any]
    supports: Callable[..., str | None] = _serves_all
    checks: bool = False


@dataclass(frozen=True)
class Explanation:
    """The backend that serves a call, and ``skipped``: the others, each with its reason."""

    op: str
    backend: str
    skipped: dict[str, str]

    def __str__(self) -> str:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.skipped.items())
        return f"{self.op} is served by {self.backend}{reasons}"


class BackendError(RuntimeError):
    """A forced backend cannot serve a call."""


_table: dict[str, dict[str, Implementation]] = {}
_missing: dict[str, str] = {}  # backend: why its library is missing
_differentiable: set[str] = set()


def implements(
    op: str, backend: str, supports: Callable[..., str | None] = _serves_all, checks: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the `Implementation` of ``op`` on ``backend``."""

    def register_function(function: Callable[..., Any]) -> Callable[..., Any]:
        register(op, backend, Implementation(function, supports, checks))
        return function

    return register_function


def register(op: str, backend: str, implementation: Implementation) -> None:
    """Register an implementation; it replaces an earlier one."""
    _table.setdefault(op, {})[_known(backend)] = implementation


def absent(backend: str, reason: str) -> None:
    """Record why a backend's library is missing."""
    _missing[_known(backend)] = reason


def differentiable(op: str) -> None:
    """Record that an op has a backward; `call` refuses a first argument with ``requires_grad`` for all others."""
    _differentiable.add(op)


def serves_device(device: str) -> Callable[..., str | None]:
    """Return a ``supports`` that accepts tensors on one type of device."""

    def supports(*args: Any) -> str | None:
        actual = device_of(args).type
        return None if actual == device else f"the tensors are on {actual}"

    return supports


def implementations() -> dict[str, dict[str, Implementation]]:
    """Return a copy of the table: op, backend, implementation."""
    return {op: dict(backends) for op, backends in _table.items()}


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    return backend


def _from_environment() -> str | None:
    name = os.environ.get("LAYERSKIP_BACKEND")
    return _known(name) if name else None


_DEFAULT = _from_environment()
_forced: ContextVar[str | None] = ContextVar("layerskip_backend", default=_DEFAULT)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend in a ``with`` block; a call that it cannot serve raises `BackendError`.

    Parameters
    ----------
    name : {"cuda", "triton", "cpu", "reference"} or None
        None restores the automatic choice.

    Raises
    ------
    ValueError
        If ``name`` is another.
    """
    token = _forced.set(None if name is None else _known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """Return the forced backend, or None."""
    return _forced.get()


def device_of(args: tuple[Any, ...]) -> torch.device:
    """Return the device of a call's first tensor."""
    return next(arg for arg in args if isinstance(arg, Tensor)).device


def reason_against(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Return why a backend does not serve a call, or None."""
    implementation = _table[op].get(backend)
    if implementation is None:
        return _missing.get(backend, f"{op} has no {backend} implementation")
    return implementation.supports(*args)


def explain(op: str, *args: Any) -> Explanation:
    """Return which backend serves ``op(*args)``, and why those preferred to it do not.

    Parameters
    ----------
    op : str
        Name of an op.
    *args
        The positional arguments of ``torch.ops.layerskip.<op>``.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError
        If ``op`` is unknown.
    BackendError
        If a backend is forced and cannot serve the call, or none can.
    """
    if op not in _table:
        raise ValueError(f"unknown op {op!r}, expected one of {', '.join(sorted(_table))}")
    forced = _forced.get()
    candidates = PREFERENCE.get(device_of(args).type, ("reference",)) if forced is None else (forced,)
    skipped: dict[str, str] = {}
    for backend in candidates:
        reason = reason_against(op, backend, args)
        if reason is None:
            return Explanation(op, backend, skipped)
        skipped[backend] = reason
    listing = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    raise BackendError(f"no backend serves {op} ({listing})")


def checked(op: str, *args: Any) -> Any:
    """Check the arguments of an op with `_checks`; return them bound."""
    bound = bind(op, *args)
    getattr(_checks, op)(bound)
    return bound


def _run(op: str, implementation: Implementation, args: tuple[Any, ...]) -> Any:
    """Check and compute. A compiled library's argument error becomes a ValueError, with the message of `_checks`."""
    try:
        if not implementation.checks:
            checked(op, *args)
        return implementation.function(*args)
    except RuntimeError as error:
        checked(op, *args)
        message = str(error).splitlines()[0]
        if not message.startswith(REFUSAL):  # torch's own, such as out of memory
            raise
        raise ValueError(message.removeprefix(REFUSAL)) from error


def serve(op: str, *args: Any) -> Any:
    """Run the implementation that `explain` names: the kernel of ``torch.ops.layerskip.<op>``."""
    device = device_of(args).type
    if torch.is_autocast_enabled(device):  # it would change the dtypes within implementations that use torch
        with torch.autocast(device, enabled=False):
            return serve(op, *args)
    return _run(op, _table[op][explain(op, *args).backend], args)


def call(op: str, *args: Any) -> Any:
    """Run an op: the entry point of the public functions and the model library.

    An eager call on CPU tensors goes straight to the native kernel if that serves it: with a cold cache the checks and
    two passes through torch's dispatcher take as long as a small kernel. Others go through ``torch.ops.layerskip``.
    """
    first, recording, compiling = args[0], torch.is_grad_enabled(), torch.compiler.is_compiling()
    if recording and first.requires_grad and op not in _differentiable:
        raise ValueError(f"{op} has no backward; call it under torch.no_grad(), or detach its inputs")
    if not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        _check_transforms(op, args)
    if type(first) is Tensor and first.is_cpu and not compiling:
        native = _table[op].get("cpu")
        needs_autograd = recording and op in _differentiable and _needs_gradient(args)
        if native is not None and native.checks and _forced.get() in (None, "cpu") and not needs_autograd:
            return _run(op, native, args)
    return getattr(ops, op).default(*args)


def _check_transforms(op: str, args: tuple[Any, ...]) -> None:
    """Refuse torch.func's derivatives and forward-mode differentiation, for which torch would give zeros or fail."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    reverse = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and _needs_gradient(args)
    if reverse or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op} supports neither the derivatives of torch.func nor forward-mode differentiation; use "
            "torch.autograd.grad or backward()"
        )


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
