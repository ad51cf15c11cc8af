"""What the modules share: weights kept by reference, and inference alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shared(weight: Tensor) -> nn.Parameter:
    """``weight`` as a Parameter on the same storage; one that is a Parameter already stays the very object."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def reject_gradient(hidden: Tensor) -> None:
    """The fused ops have no backward, and a silent cut of the graph would train nothing."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError("this module has no backward; call it under torch.no_grad(), or detach its input")
