"""Layers as nine launches each and one more per split product, with the bits of the composed ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..schemas import KVCache, LayerWeights, bind, split_layers
from .linear import linear, qkv, swiglu
from .rms_norm import rms_norm
from .rope_kv_append import rope_kv_append
from .verify_attention import verify_attention


def _layer(hidden: Tensor, weights: LayerWeights, cache: KVCache, eps: float) -> Tensor:
    """One pre-norm decoder layer, [B, M, D] -> [B, M, D]."""
    batch, rows, hidden_size = hidden.shape
    head_dim, w = cache.k_cache.shape[3], weights
    flat = hidden.view(-1, hidden_size)

    projected = qkv(rms_norm(flat, w.attn_norm, eps), w.q, w.k, w.v, (w.q_bias, w.k_bias, w.v_bias))
    q, k, v = (x.view(batch, rows, x.shape[1] // head_dim, head_dim) for x in projected)
    places = (cache.cos, cache.sin, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)
    q = rope_kv_append(q, k, v, *places, (w.q_norm, w.k_norm), eps)
    attended = verify_attention(q, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)
    flat = linear(attended.view(batch * rows, w.q.shape[0]), w.o, residual=flat)
    activated = swiglu(rms_norm(flat, w.mlp_norm, eps), w.gate, w.up)
    return linear(activated, w.down, residual=flat).view(batch, rows, hidden_size)


def partial_forward(*args: Any) -> Tensor:
    a = bind("partial_forward", *args)
    hidden = a.hidden.contiguous() if a.start < a.end else a.hidden.clone()
    for layer, weights in enumerate(split_layers(a.weights, a.start, a.end), a.start):
        cache = KVCache(a.k_cache[layer], a.v_cache[layer], a.cos, a.sin, a.seq_lens, a.slots)
        hidden = _layer(hidden, weights, cache, a.eps)
    return hidden
