"""Layers for the Hugging Face ``kernels`` package, which swaps the ``forward`` of a model's module for theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import rms_norm


class RMSNorm(nn.Module):
    """`layerskip_kernels.rms_norm` for a module with ``weight`` [D] and ``variance_epsilon``.

    This is transformers' layer RMSNorm of Llama, Mistral, Qwen and others.
    """

    weight: torch.nn.Parameter
    variance_epsilon: float
    can_torch_compile: bool = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> [..., D], of the same dtype."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
