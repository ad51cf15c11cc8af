"""Which implementation serves a call, and why; and the one way to call an op.

PyTorch's dispatcher picks the device; the table here picks among the implementations for it. Each of them says through
``supports(*args)`` why it cannot serve a call, or None when it can.
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

from . import _checks
from ._ops import ops
from .schemas import bind

BACKENDS = ("cuda", "triton", "cpu", "reference")
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
# How an error begins that the compiled libraries raise for an argument (common/checks.h). A prefix, because the stable
# ABI makes every C++ exception the same RuntimeError.
REFUSAL = "layerskip: "


def _serves_all(*args: Any) -> None:
    """The `supports` of an implementation without conditions."""


@dataclass(frozen=True)
class Implementation:
    """A function that computes an op, and the question whether it can serve given arguments.

    With ``checks`` the function checks its arguments itself; `_checks` runs only after it has raised, for the message.
    """

    function: Callable[..., Any]
    supports: Callable[..., str | None] = _serves_all
    checks: bool = False


@dataclass(frozen=True)
class Explanation:
    """Who serves a call, and why the others do not (``skipped`` maps a backend to its reason)."""

    op: str
    backend: str
    skipped: dict[str, str]

    def __str__(self) -> str:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.skipped.items())
        return f"{self.op} is served by {self.backend}{reasons}"


class BackendError(RuntimeError):
    """A forced backend cannot serve a call."""


_table: dict[str, dict[str, Implementation]] = {}
_absent: dict[str, str] = {}  # backend: why its library is not there
_differentiable: set[str] = set()


def implements(
    op: str, backend: str, supports: Callable[..., str | None] = _serves_all, checks: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the implementation of ``op`` on ``backend``; see `Implementation`."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        register(op, backend, Implementation(function, supports, checks))
        return function

    return enter


def register(op: str, backend: str, implementation: Implementation) -> None:
    """Register an implementation; it replaces an earlier one."""
    _table.setdefault(op, {})[_known(backend)] = implementation


def absent(backend: str, reason: str) -> None:
    """Record why a backend is missing: the reason why it serves none of the ops that it does not implement."""
    _absent[_known(backend)] = reason


def differentiable(op: str) -> None:
    """Record that an op has a backward; `call` refuses a first argument that needs a gradient for all others."""
    _differentiable.add(op)


def serves_device(device: str) -> Callable[..., str | None]:
    """The `supports` of an implementation for tensors on one type of device."""

    def supports(*args: Any) -> str | None:
        actual = device_of(args).type
        return None if actual == device else f"the tensors are on {actual}"

    return supports


def implementations() -> dict[str, dict[str, Implementation]]:
    """A copy of the table: op, backend, implementation."""
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
    """Force one backend within a ``with`` block; a call that it cannot serve raises `BackendError`.

    Parameters
    ----------
    name : {"cuda", "triton", "cpu", "reference"} or None
        None goes back to the automatic choice.

    Raises
    ------
    ValueError
        If ``name`` is none of these.
    """
    token = _forced.set(None if name is None else _known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that is forced now, or None."""
    return _forced.get()


def device_of(args: tuple[Any, ...]) -> torch.device:
    """The device of a call's first tensor."""
    return next(arg for arg in args if isinstance(arg, Tensor)).device


def reason_against(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why a backend does not serve a call, or None."""
    implementation = _table[op].get(backend)
    if implementation is None:
        return _absent.get(backend, f"{op} has no {backend} implementation")
    return implementation.supports(*args)


def explain(op: str, *args: Any) -> Explanation:
    """Say which backend serves ``op(*args)`` and why the ones before it do not.

    Parameters
    ----------
    op : str
        Name of an op, as in `layerskip_kernels.functional`.
    *args
        The op's positional arguments, as ``torch.ops.layerskip.<op>`` takes them.

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
    """The arguments of an op, bound; raises, with the words of `_checks`, where they do not fit it."""
    bound = bind(op, *args)
    getattr(_checks, op)(bound)
    return bound


def _run(op: str, implementation: Implementation, args: tuple[Any, ...]) -> Any:
    """Check and compute. What a compiled library refuses is a ValueError in the words of `_checks`, or else its own."""
    try:
        if not implementation.checks:
            checked(op, *args)
        return implementation.function(*args)
    except RuntimeError as error:
        checked(op, *args)
        message = str(error).splitlines()[0]
        if not message.startswith(REFUSAL):  # torch's own: memory that cannot be had, say
            raise
        raise ValueError(message.removeprefix(REFUSAL)) from error


def serve(op: str, *args: Any) -> Any:
    """The kernel of ``torch.ops.layerskip.<op>``: run the implementation that `explain` names."""
    return _run(op, _table[op][explain(op, *args).backend], args)


def call(op: str, *args: Any) -> Any:
    """Run an op; what all public functions and the model library call.

    An eager call on CPU tensors goes straight to the native kernel where that would serve it: in a cold cache the
    checks and two hops of torch's dispatcher take as long as a small kernel. All other calls go through
    ``torch.ops.layerskip``.
    """
    first, recording = args[0], torch.is_grad_enabled()
    if recording and first.requires_grad and op not in _differentiable:
        raise ValueError(f"{op} has no backward; call it under torch.no_grad(), or detach its inputs")
    if type(first) is Tensor and first.is_cpu and not torch.compiler.is_compiling():
        native = _table[op].get("cpu")
        needs_autograd = recording and op in _differentiable and _needs_gradient(args)
        if native is not None and native.checks and _forced.get() in (None, "cpu") and not needs_autograd:
            return _run(op, native, args)
    return getattr(ops, op).default(*args)


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
