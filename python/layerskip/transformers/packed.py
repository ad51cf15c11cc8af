"""Modules with packed weights, for models of transformers: what ``layerskip quantize`` wrote, on the same storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerskip_kernels import linear
from layerskip_kernels.formats import format_of, lookup

from ..models.layers import torch_linear

SKINNY_ROWS = 16  # one tile; for more rows the arithmetic costs more than reading the weights


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed, in the place of another one.

    Up to `SKINNY_ROWS` rows take the op; more, and what needs a gradient, torch's product of the weight unpacked for
    the call.

    Parameters
    ----------
    plain : torch.nn.Linear
        Without values; its bias is taken.
    row_bytes : int
        Of the packed weight.

    Attributes
    ----------
    weight : Parameter [N, bytes], uint8

    Raises
    ------
    ValueError
        If no format has as many bytes.
    """

    def __init__(self, plain: Any, row_bytes: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.weight = _bytes(self.out_features, row_bytes, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., D_in] to [..., D_out]."""
        rows = input.reshape(-1, self.in_features)
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        product = torch_linear if needs_gradient or not 0 < len(rows) <= SKINNY_ROWS else linear
        return product(rows, self.weight, self.bias).view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and format."""
        form = format_of(self.weight, self.in_features).name
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={form}"


class PackedEmbedding(nn.Module):
    """An embedding whose weight is packed, in the place of another one; rows are unpacked as they are looked up.

    Parameters
    ----------
    plain : torch.nn.Embedding
        Without values; rows come out in its dtype, times its ``scalar_embed_scale`` if it has one, as Gemma's do.
    row_bytes : int

    Attributes
    ----------
    weight : Parameter [V, bytes], uint8

    Raises
    ------
    ValueError
        If no format has as many bytes.
    """

    like: Tensor

    def __init__(self, plain: Any, row_bytes: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = plain.num_embeddings, plain.embedding_dim
        self.scale = float(getattr(plain, "scalar_embed_scale", 1.0))
        self.weight = _bytes(self.num_embeddings, row_bytes, self.embedding_dim)
        self.register_buffer("like", plain.weight.new_empty(0), persistent=False)  # a conversion reaches its dtype

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] to rows [..., D]."""
        rows = lookup(self.weight, input, self.embedding_dim, self.like.dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weights={format_of(self.weight, self.embedding_dim).name}"


def _bytes(rows: int, row_bytes: int, width: int) -> nn.Parameter:
    weight = torch.empty(rows, row_bytes, dtype=torch.uint8)
    format_of(weight, width)
    return nn.Parameter(weight, requires_grad=False)
