"""One decoder layer on the many rows of a prompt, and the part of one that later rows see."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from layerskip_kernels import KVCache, LayerWeights, rms_norm, rope_kv_append, verify_attention
from layerskip_kernels.formats import plain

INPUTS = {
    "q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attended",
    "gate": "feed-forward", "up": "feed-forward", "gate_up": "feed-forward", "down": "gated",
}  # fmt: skip
"""What each matrix of a layer is multiplied by, by names that `prefill_layer` tells. A layer has some of them."""
ATTENTION_ROWS = 64  # of one call on a CPU: its partial results stay in the caches

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [R, D], weight, bias) -> x @ weightᵀ + bias."""
Watch = Callable[[str, Tensor], None]
"""Called with a name in `INPUTS`, and what the matrices are multiplied by."""


def prefill_layer(
    hidden: Tensor,
    weights: LayerWeights,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    past: int,
    eps: float,
    watch: Watch | None = None,
) -> Tensor:
    """Compute one layer as `layerskip_kernels.partial_forward` defines it, with torch's matmuls and attention.

    Parameters
    ----------
    hidden : Tensor [B, N, D]
    weights : LayerWeights
    k_cache, v_cache : Tensor [B, G, T, C]
        Written at positions ``past`` to ``past + N - 1``.
    cos, sin : Tensor [≥ T, C/2], fp32
    seq_lens : Tensor [B], int64
        ``past``, on the device.
    past : int
        How many positions the cache already holds.
    eps : float
    watch : callable, optional
        Called for each of the inputs of matmuls.
    """
    seen = watch or (lambda name, states: None)
    batch, rows, _ = hidden.shape
    head_dim = k_cache.shape[3]
    normed = rms_norm(hidden, weights.attn_norm, eps)
    seen("attention", normed)
    q = torch_linear(normed, weights.q, weights.q_bias).view(batch, rows, -1, head_dim)
    k = torch_linear(normed, weights.k, weights.k_bias).view(batch, rows, -1, head_dim)
    v = torch_linear(normed, weights.v, weights.v_bias).view(batch, rows, -1, head_dim)
    q = q if weights.q_norm is None else rms_norm(q, weights.q_norm, eps)
    k = k if weights.k_norm is None else rms_norm(k, weights.k_norm, eps)
    q = rope_kv_append(q, k, v, cos, sin, k_cache, v_cache, seq_lens)
    attended = attend_prompt(q, k_cache, v_cache, seq_lens, past)
    seen("attended", attended)
    hidden = hidden + torch_linear(attended, weights.o)
    normed = rms_norm(hidden, weights.mlp_norm, eps)
    seen("feed-forward", normed)
    gated = F.silu(torch_linear(normed, weights.gate)) * torch_linear(normed, weights.up)
    seen("gated", gated)
    return hidden + torch_linear(gated, weights.down)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch's product x weightᵀ + bias; a weight that is packed is unpacked for this call alone."""
    return F.linear(x, plain(weight, x.shape[-1], x.dtype), bias)


def write_keys(hidden: Tensor, weights: LayerWeights, cache: KVCache, eps: float, product: Product) -> None:
    """Write the keys and values of a layer, and compute nothing else of it.

    Parameters
    ----------
    hidden : Tensor [B, N, D]
        Before the layer.
    weights : LayerWeights
    cache : KVCache
        Of this layer alone.
    eps : float
    product : callable
    """
    batch, rows, _ = hidden.shape
    normed = rms_norm(hidden, weights.attn_norm, eps).flatten(0, 1)
    shape = (batch, rows, -1, cache.k_cache.shape[3])
    k = product(normed, weights.k, weights.k_bias).view(shape)
    v = product(normed, weights.v, weights.v_bias).view(shape)
    k = k if weights.k_norm is None else rms_norm(k, weights.k_norm, eps)
    rope_kv_append(k, k, v, cache.cos, cache.sin, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)


def attend_prompt(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, past: int) -> Tensor:
    """Causal attention of q [B, N, H, C] over what the cache holds; [B, N, H C]."""
    if q.device.type == "cpu":
        # Torch's own is two to five times slower there: a mask keeps it from skipping what no row sees.
        return attend_in_pieces(q, k_cache, v_cache, seq_lens)
    return attend_masked(q, k_cache, v_cache, past)


def attend_in_pieces(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
    """With this library's kernel."""
    attended = [
        verify_attention(piece, k_cache, v_cache, seq_lens + i * ATTENTION_ROWS)
        for i, piece in enumerate(q.split(ATTENTION_ROWS, dim=1))
    ]
    return torch.cat(attended, dim=1).flatten(2)


def attend_masked(q: Tensor, k_cache: Tensor, v_cache: Tensor, past: int) -> Tensor:
    """With torch's attention.

    It reads the cache up to the last valid position: beyond it there may be NaN, which a mask does not keep out of V.
    """
    rows = q.shape[1]
    keys, values = k_cache[:, :, : past + rows], v_cache[:, :, : past + rows]
    # No tensor for a mask: that would rule out flash attention on a card.
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=causal_lower_right(rows, past + rows), enable_gqa=True
    )
    return attended.transpose(1, 2).flatten(2)
