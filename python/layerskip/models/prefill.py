"""One decoder layer on the many rows of a prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from layerskip_kernels import LayerWeights, rms_norm, rope_kv_append, verify_attention
from layerskip_kernels.formats import is_packed, plain

INPUTS = {
    "q": "attention", "k": "attention", "v": "attention", "o": "attended",
    "gate": "feed-forward", "up": "feed-forward", "down": "gated",
}  # fmt: skip
"""What each matrix of a layer is multiplied by, by names that `prefill_layer` tells."""
ATTENTION_ROWS = 64  # of one call on a CPU: its partial results stay in the caches


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
    watch: Callable[[str, Tensor], None] | None = None,
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
        Called with each of the inputs of matmuls, and its name in `INPUTS`.
    """
    seen = watch or (lambda name, states: None)
    batch, rows, _ = hidden.shape
    weights = _plain(weights, hidden.dtype)
    head_dim = k_cache.shape[3]
    normed = rms_norm(hidden, weights.attn_norm, eps)
    seen("attention", normed)
    q = F.linear(normed, weights.q, weights.q_bias).view(batch, rows, -1, head_dim)
    k = F.linear(normed, weights.k, weights.k_bias).view(batch, rows, -1, head_dim)
    v = F.linear(normed, weights.v, weights.v_bias).view(batch, rows, -1, head_dim)
    q = q if weights.q_norm is None else rms_norm(q, weights.q_norm, eps)
    k = k if weights.k_norm is None else rms_norm(k, weights.k_norm, eps)
    q = rope_kv_append(q, k, v, cos, sin, k_cache, v_cache, seq_lens)
    attended = _attend(q, k_cache, v_cache, seq_lens, past)
    seen("attended", attended)
    hidden = hidden + F.linear(attended, weights.o)
    normed = rms_norm(hidden, weights.mlp_norm, eps)
    seen("feed-forward", normed)
    gated = F.silu(F.linear(normed, weights.gate)) * F.linear(normed, weights.up)
    seen("gated", gated)
    return hidden + F.linear(gated, weights.down)


def _plain(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """The weights of a layer for torch's matmuls: what is packed is computed for this call alone."""
    if not any(is_packed(weight) for weight in weights if weight is not None):
        return weights
    hidden_size, intermediate_size, queries = weights.attn_norm.shape[0], weights.gate.shape[0], weights.q.shape[0]
    widths = dict.fromkeys(("q", "k", "v", "gate", "up"), hidden_size) | {"o": queries, "down": intermediate_size}
    return weights._replace(**{name: plain(getattr(weights, name), width, dtype) for name, width in widths.items()})


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, past: int) -> Tensor:
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
