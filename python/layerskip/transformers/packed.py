"""Modules with packed weights, for models of transformers: what ``layerskip quantize`` wrote, on the same storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerskip_kernels import linear
from layerskip_kernels.formats import format_of, lookup

from ..models.generic_layers import torch_linear

SKINNY_ROWS = 16  # one tile; for more rows the arithmetic costs more than reading the weights


class PackedLinear(nn.Module):
    """A linear layer with a packed weight [N, bytes], in the place of ``plain``, whose bias is kept.

    Up to `SKINNY_ROWS` rows use the op; more rows, and gradients, torch's product with the weight unpacked for the
    call. ValueError if no format has ``row_bytes``.
    """

    def __init__(self, plain: Any, row_bytes: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.weight = _bytes(self.out_features, row_bytes, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        product = torch_linear if needs_gradient or not 0 < len(rows) <= SKINNY_ROWS else linear
        return product(rows, self.weight, self.bias).view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        form = format_of(self.weight, self.in_features).name
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={form}"


class PackedEmbedding(nn.Module):
    """An embedding with a packed weight [V, bytes], in the place of ``plain``; rows are unpacked as they are looked up.

    Rows have the dtype of ``plain``, and are scaled by its ``scalar_embed_scale``, if any (Gemma). ValueError if no
    format has ``row_bytes``.
    """

    like: Tensor

    def __init__(self, plain: Any, row_bytes: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = plain.num_embeddings, plain.embedding_dim
        self.scale = float(getattr(plain, "scalar_embed_scale", 1.0))
        self.weight = _bytes(self.num_embeddings, row_bytes, self.embedding_dim)
        self.register_buffer("like", plain.weight.new_empty(0), persistent=False)  # a conversion reaches its dtype

    def forward(self, input: Tensor) -> Tensor:
        rows = lookup(self.weight, input, self.embedding_dim, self.like.dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weights={format_of(self.weight, self.embedding_dim).name}"


def _bytes(rows: int, row_bytes: int, width: int) -> nn.Parameter:
    weight = torch.empty(rows, row_bytes, dtype=torch.uint8)
    format_of(weight, width)
    return nn.Parameter(weight, requires_grad=False)
