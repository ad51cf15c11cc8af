"""The parts that checks of arguments are made of: one condition of one tensor, or of some, and its message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import PANEL_ROWS, format_of, is_interleaved, is_packed, kind_of


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if len(shape) != len(wanted):
        return False
    for have, want in zip(shape, wanted, strict=True):  # noqa: SIM110  (runs per token; a generator costs twice this)
        if want is not None and want != have:
            return False
    return True


def shaped(name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Check rank, sizes (None admits any) and dtype of one tensor."""
    if not fits(tensor.shape, shape):
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {wanted}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected {names}")


def matrix(name: str, weight: Tensor, rows: int | None, width: int, dtype: torch.dtype) -> None:
    """The weight of a matmul for states of ``width`` in ``dtype``: plain or packed."""
    if not is_packed(weight):
        shaped(name, weight, [rows, width], [dtype])
        return
    shaped(name, weight, [rows, None], [weight.dtype])
    if is_interleaved(weight):
        even = weight.shape[0] % PANEL_ROWS == 0
        require(even, f"{name} is interleaved and has {weight.shape[0]} rows, expected a multiple of {PANEL_ROWS}")
    try:
        format_of(weight, width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def alike(first_name: str, first: Tensor, name: str, weight: Tensor, width: int) -> None:
    """Two weights that multiply the same activations."""
    require(
        first.dtype == weight.dtype and (not is_packed(first) or kind_of(first, width) == kind_of(weight, width)),
        f"{first_name} and {name} must be all plain, all of integers, or all of fp8, and all or none interleaved",
    )


def sized(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """A layer's tensor: a vector, or the weight of a matmul."""
    if len(shape) == 2:
        matrix(name, tensor, shape[0], shape[1], dtype)
    else:
        shaped(name, tensor, shape, [dtype])


def dense(**tensors: Tensor | None) -> None:
    """Weights and caches are used where they lie, so they must be contiguous; activations may be strided."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, its strides are {tuple(tensor.stride())} for shape {list(tensor.shape)}"
            )


def same_device(first: Tensor, **others: Tensor | None) -> None:
    """Check that all are where the first argument is."""
    device = first.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the first argument on {first.device}")
