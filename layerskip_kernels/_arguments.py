"""What the checks of the ops are made of: one property of one tensor each, and the words where it does not hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if len(shape) != len(wanted):
        return False
    for have, want in zip(shape, wanted, strict=True):  # noqa: SIM110  (runs per token; a generator costs twice this)
        if want is not None and want != have:
            return False
    return True


def shaped(name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Check rank, sizes (None admits any) and dtype of one tensor."""
    if not _fits(tensor.shape, shape):
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {wanted}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected {names}")


def dense(**tensors: Tensor | None) -> None:
    """Weights and caches are used where they lie, so they must be contiguous; activations may be strided."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, its strides are {tuple(tensor.stride())} for shape {list(tensor.shape)}"
            )


def same_device(first: Tensor, **others: Tensor | None) -> None:
    device = first.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the first argument on {first.device}")


def written(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Logits to write: each row is contiguous, the rows may lie apart."""
    shaped(name, tensor, shape, [torch.float32])
    require(
        tensor.stride(-1) == 1 or tensor.shape[-1] <= 1,
        f"the rows of {name} must be contiguous, its strides are {tuple(tensor.stride())}",
    )
