"""Layers that stand in for those of models, as the Hugging Face ``kernels`` package puts them there.

Each has a ``forward`` and nothing else: it is given to a module of the model, whose members it uses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import rms_norm


class RMSNorm(nn.Module):
    """`layerskip_kernels.rms_norm` in the place of a module with ``weight`` [D] and ``variance_epsilon``.

    Transformers calls its layers of that kind RMSNorm: those of Llama, Mistral, Qwen and others.
    """

    weight: torch.nn.Parameter
    variance_epsilon: float
    can_torch_compile: bool = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> [..., D], of the same dtype."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
