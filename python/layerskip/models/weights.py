"""The weights of a layer, kept by reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from layerskip_kernels import LayerWeights

HeldWeights: TypeAlias = "LayerWeights | Mapping[str, Tensor]"
"""The tensors of a layer by name, as they are kept."""
JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""What some models keep as one parameter: the rows of one matrix behind those of the other."""


def shared(weight: Tensor) -> nn.Parameter:
    """``weight`` as a Parameter on the same storage; one that is a Parameter already stays the very object."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def reject_gradient(hidden: Tensor) -> None:
    """Raise where a gradient is asked for: the fused ops have none, and without an error nothing would be trained."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError("this module has no backward; call it under torch.no_grad(), or detach its input")


def present(layer: HeldWeights) -> dict[str, Tensor]:
    """The tensors that a layer has, by name."""
    named = layer._asdict() if isinstance(layer, LayerWeights) else layer
    return {name: weight for name, weight in named.items() if weight is not None}


def parts_of(held: Mapping[str, Tensor], keys: int) -> dict[str, Tensor]:
    """The tensors of a layer with views of rows in the place of what is joined; ``keys`` is G C, the rows of k."""
    parts: dict[str, Tensor] = {}
    for name, weight in held.items():
        if name not in JOINED:
            parts[name] = weight
            continue
        rows = weight.shape[0]
        sizes = [rows - 2 * keys, keys, keys] if name == "qkv" else [rows // 2, rows - rows // 2]
        parts |= zip(JOINED[name], weight.detach().split(sizes), strict=True)
    return parts
