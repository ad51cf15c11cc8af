"""The weights of a layer, kept by reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shared(weight: Tensor) -> nn.Parameter:
    """``weight`` as a Parameter on the same storage; one that is a Parameter already stays the very object."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def reject_gradient(hidden: Tensor) -> None:
    """Raise where a gradient is asked for: the fused ops have none, and without an error nothing would be trained."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError("this module has no backward; call it under torch.no_grad(), or detach its input")
