"""Enters every implementation into the dispatch table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _extension, _ops, cpu_loss, dispatch, reference, triton


def _always(*args: Any) -> None:
    return None


def _native_supports(device: str, reason: str | None) -> Callable[..., str | None]:
    def supports(*args: Any) -> str | None:
        if reason is not None:
            return reason
        actual = next(arg for arg in args if isinstance(arg, Tensor)).device
        if actual.type != device:
            return f"the tensors are on {actual.type}"
        return _extension.cuda_card_reason(actual.index) if device == "cuda" else None

    return supports


def _missing(op: str, device: str, reason: str | None) -> str | None:
    """Why the compiled library of a device serves no call of an op, or None."""
    if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"layerskip_native::{op}", device.upper()):
        return f"{op} is not written yet"
    return reason


def register_all() -> None:
    """One line an op and backend."""
    for op in _ops.SCHEMAS:
        for device, reason in (("cuda", _extension.cuda_reason), ("cpu", _extension.cpu_reason)):
            dispatch.register(op, device, _ops.native(op), _native_supports(device, _missing(op, device, reason)))
        if op in triton.OPS:
            dispatch.register(op, "triton", triton.implementation(op), triton.supports)
        dispatch.register(op, "reference", getattr(reference, f"{op}_ref"), _always)
    for op, function in (
        ("early_exit_loss", cpu_loss.early_exit_loss_cpu),
        ("early_exit_loss_backward", cpu_loss.early_exit_loss_backward_cpu),
    ):  # written in torch, so it needs no compiled library
        dispatch.register(op, "cpu", function, _native_supports("cpu", None))
