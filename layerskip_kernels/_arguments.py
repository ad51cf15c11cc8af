"""What the checks of the ops are made of, and the words where something does not hold."""

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


def sampling(first: Tensor, rows: int, **given: Tensor | None) -> None:
    """Temperatures and what names the noise, one a row, all or none."""
    absent = [name for name, tensor in given.items() if tensor is None]
    require(not absent, f"{', '.join(given)} come together, {', '.join(absent)} is missing")
    for name, tensor in given.items():
        assert tensor is not None
        shaped(name, tensor, [rows], [torch.float32 if name == "temperature" else torch.int64])
    dense(**given)
    same_device(first, **given)


def cache_slots(slots: Tensor | None, batch: int, cached: int) -> None:
    """Which of the cache's ``cached`` rows each of ``batch`` sequences uses."""
    if slots is not None:
        shaped("slots", slots, [batch], [torch.int64])
        dense(slots=slots)
        require(batch <= cached, f"slots has {batch} entries, the cache only {cached} rows")
