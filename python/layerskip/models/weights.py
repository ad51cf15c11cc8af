"""The weights of a layer, kept by reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class LayerWeights(NamedTuple):
    """The tensors of one layer, in the order in which `layerskip_kernels.partial_forward` takes them."""

    attn_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


OPTIONAL = tuple(LayerWeights._field_defaults)
REQUIRED = tuple(name for name in LayerWeights._fields if name not in OPTIONAL)


def shared(weight: Tensor) -> nn.Parameter:
    """``weight`` as a Parameter on the same storage; one that is a Parameter already stays the very object."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def reject_gradient(hidden: Tensor) -> None:
    """Raise where a gradient is asked for: the fused ops have none, and without an error nothing would be trained."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError("this module has no backward; call it under torch.no_grad(), or detach its input")
