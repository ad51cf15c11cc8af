"""Which implementation serves a call, and why.

PyTorch's dispatcher picks the device; the table here picks among the implementations for it. Each candidate says
through ``supports(*args)`` why it cannot serve a call, or None when it can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}


@dataclass(frozen=True)
class Implementation:
    """A function that computes an op, and the question whether it can serve given arguments."""

    function: Callable[..., Any]
    supports: Callable[..., str | None]


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


def register(op: str, backend: str, function: Callable[..., Any], supports: Callable[..., str | None]) -> None:
    """Enter ``function`` as the implementation of ``op`` on ``backend``."""
    _table.setdefault(op, {})[_known(backend)] = Implementation(function, supports)


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


def _device(args: tuple[Any, ...]) -> str:
    return next(arg for arg in args if isinstance(arg, Tensor)).device.type


def _reason(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    candidate = _table.get(op, {}).get(backend)
    return f"{op} has no {backend} implementation" if candidate is None else candidate.supports(*args)


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
    candidates = PREFERENCE.get(_device(args), ("reference",)) if forced is None else (forced,)
    skipped: dict[str, str] = {}
    for backend in candidates:
        reason = _reason(op, backend, args)
        if reason is None:
            return Explanation(op, backend, skipped)
        skipped[backend] = reason
    listing = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    raise BackendError(f"no backend serves {op} ({listing})")


def direct(op: str, first: Tensor) -> Callable[..., Any] | None:
    """The native CPU kernel where an eager call on a plain CPU tensor would end there anyway, else None."""
    if type(first) is not Tensor or not first.is_cpu or _forced.get() not in (None, "cpu"):
        return None
    candidate = _table[op].get("cpu")
    return candidate.function if candidate is not None and candidate.supports(first) is None else None


def call(op: str, *args: Any) -> Any:
    """Run ``op`` on the implementation that `explain` names."""
    forced = _forced.get()
    if forced is None:
        for backend in PREFERENCE.get(_device(args), ("reference",)):
            candidate = _table[op].get(backend)
            if candidate is not None and candidate.supports(*args) is None:
                return candidate.function(*args)
    return _table[op][explain(op, *args).backend].function(*args)
