"""Hugging Face's modules with another forward: for the few rows of a decoding step they run this library's ops.

An instance changes its class and nothing else. So its parameters, their names, hooks and training mode stay the same,
also in copies and checkpoints. The original forward still runs for many rows, where torch's matmuls are faster, for
whatever may need a gradient, and under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerskip_kernels import dispatch, linear, rms_norm, swiglu
from layerskip_kernels.formats import is_packed

from ..models.architectures import FLOATS
from ..models.watch import ORIGINAL_CLASS
from .packed import SKINNY_ROWS, PackedLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _served(x: Tensor, *weights: Tensor) -> bool:
    """Whether an op may take ``x``: no gradient, no conversion on the way, and a dtype and device that have kernels."""
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return False
    kind = x.device.type
    if kind not in dispatch.PREFERENCE or torch.is_autocast_enabled(kind):
        return False
    return (
        x.numel() > 0 and x.dtype in FLOATS and all(weight.dtype == x.dtype or is_packed(weight) for weight in weights)
    )


def _is_skinny(x: Tensor) -> bool:
    return x.numel() <= SKINNY_ROWS * x.shape[-1]


class FusedRMSNorm(nn.Module):
    """RMS norm in one pass; ``variance_epsilon`` and ``weight`` are the original module's."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Norm the last dimension of ``hidden_states`` [..., D]."""
        if not _served(hidden_states, self.weight):
            return _original(self).forward(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        """Shape and epsilon, as the original prints them."""
        return _original(self).extra_repr(self)


class SkinnyLinear(nn.Linear):
    """A linear layer that reads its weight once for up to `SKINNY_ROWS` rows."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., D_in] to [..., D_out]."""
        tensors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        if not (_is_skinny(input) and _served(input, *tensors)):
            return super().forward(input)
        out = linear(input.reshape(-1, self.in_features), self.weight, self.bias)
        return out.view(*input.shape[:-1], self.out_features)


class FusedSwiGLU(nn.Module):
    """The gated feed-forward: gate, up and activation in one op, down in another."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., D] to [..., D]."""
        projections: Any = (self.gate_proj, self.up_proj, self.down_proj)
        if not (_is_skinny(x) and all(map(_is_bare, projections))):
            return _original(self).forward(self, x)
        gate, up, down = (projection.weight for projection in projections)
        if not _served(x, gate, up, down):
            return _original(self).forward(self, x)
        inner = swiglu(x.reshape(-1, x.shape[-1]), gate, up)
        return linear(inner, down).view(x.shape)


def _is_bare(projection: Any) -> bool:
    """Whether a call of the projection is its product and nothing else: it has no adapter and no hook."""
    if type(projection) not in (SkinnyLinear, PackedLinear) or "forward" in projection.__dict__:
        return False
    return not any(getattr(projection, hooks) for hooks in _HOOKS)


def _original(module: nn.Module) -> Any:
    return module.__dict__[ORIGINAL_CLASS]


def fuse(module: nn.Module, fused: type[nn.Module]) -> None:
    """Change the class of ``module`` to ``fused``, unless it has that class."""
    if not isinstance(module, fused):
        module.__dict__[ORIGINAL_CLASS] = type(module)
        module.__class__ = fused


def unfuse(module: nn.Module) -> None:
    """Give ``module`` the class that it had before `fuse`; a module that was not fused does not change."""
    original = module.__dict__.pop(ORIGINAL_CLASS, None)
    if original is not None:
        module.__class__ = original
