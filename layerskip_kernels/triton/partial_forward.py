"""partial_forward: nine launches a layer and one more for each split product, bit for bit the sums of the ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _checks
from .attention import rope_kv_append, verify_attention
from .linear import linear, qkv, swiglu
from .norm import rms_norm


def _layer(
    hidden: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    eps: float,
    slots: Tensor | None,
) -> Tensor:
    """One pre-norm decoder layer, [B, M, D] -> [B, M, D]."""
    attn_norm, q_w, k_w, v_w, o_w, mlp_norm, gate, up, down = weights[:9]
    q_bias, k_bias, v_bias, q_norm, k_norm = (w if w.numel() else None for w in weights[9:] or [hidden[:0]] * 5)
    batch, rows, width = hidden.shape
    size = k_cache.shape[3]
    flat = hidden.view(-1, width)

    projected = qkv(rms_norm(flat, attn_norm, eps), q_w, k_w, v_w, (q_bias, k_bias, v_bias))
    q, k, v = (x.view(batch, rows, x.shape[1] // size, size) for x in projected)
    q = rope_kv_append(q, k, v, cos, sin, k_cache, v_cache, seq_lens, slots, (q_norm, k_norm), eps)
    attended = verify_attention(q, k_cache, v_cache, seq_lens, slots).view(batch * rows, q_w.shape[0])
    flat = linear(attended, o_w, residual=flat)
    activated = swiglu(rms_norm(flat, mlp_norm, eps), gate, up)
    return linear(activated, down, residual=flat).view(batch, rows, width)


def partial_forward(
    hidden: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    start: int,
    end: int,
    eps: float,
    slots: Tensor | None = None,
) -> Tensor:
    """See `layerskip_kernels.partial_forward`."""
    count = _checks.layer_slots(weights, start, end)
    state = hidden.contiguous() if start < end else hidden.clone()
    for offset, layer in enumerate(range(start, end)):
        one = weights[offset * count : (offset + 1) * count]
        state = _layer(state, one, k_cache[layer], v_cache[layer], cos, sin, seq_lens, eps, slots)
    return state
