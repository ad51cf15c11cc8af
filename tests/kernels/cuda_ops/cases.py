"""Inputs that several of the tests share."""

from __future__ import annotations

import torch
from torch import Tensor


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element past a multiple of 16 bytes."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape).copy_(tensor)


def scattered(cache: Tensor, slots: Tensor, count: int, dim: int) -> Tensor:
    """A cache of ``count`` slots that holds ``cache`` [..., B, ...] in ``slots``, and NaN in the others."""
    shape = [*cache.shape]
    shape[dim] = count
    return torch.full(shape, float("nan"), dtype=cache.dtype).index_copy_(dim, slots, cache)
