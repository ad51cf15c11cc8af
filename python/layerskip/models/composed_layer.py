"""One decoder layer out of the small ops, for layers that `layerskip_kernels.partial_forward` does not compute.

What a row gives does not depend on the rows beside it: the ops promise that, sums of two tensors have one rounding an
element, and what torch computes in vectors is computed for each row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import KVCache, linear, rms_norm, rope_kv_append, swiglu, verify_attention

from .form import Layout
from .prefill import Product, Watch, attend_prompt, torch_linear

WINDOW_ROWS = 8  # whose windows are copied at a time


class ComposedWeights(NamedTuple):
    """The tensors of a layer; of each norm before and after attention and feed-forward there may be none.

    Shapes as in `layerskip_kernels.LayerWeights`, but that ``q_norm`` and ``k_norm`` may be as wide as all heads. In
    the place of ``gate``, ``up`` and ``down`` there may be N experts: ``router`` [N, D], ``experts_in`` [N, 2 F, D],
    the rows of gate before those of up, and ``experts_out`` [N, D, F].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    attn_norm: Tensor | None = None
    attn_post_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    router: Tensor | None = None
    experts_in: Tensor | None = None
    experts_out: Tensor | None = None


class Kernels(NamedTuple):
    """What computes products and attention: for a few rows, or for the many of a prompt.

    ``residual`` takes x, a weight and what is added; ``gated`` takes x, gate, up and whether the activation is GELU;
    ``attend`` takes q [B, M, H, C], the cache of one layer and the window, and gives [B, M, H, C].
    """

    product: Product
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    attend: Callable[[Tensor, KVCache, int | None], Tensor]


class LayerKind(NamedTuple):
    """How a layer computes: ``eps`` of norms; the window; the order of a head's values; the rest as in `Layout`."""

    eps: float
    window: int | None
    order: Tensor | None
    layout: Layout


def compute_layer(
    hidden: Tensor,
    weights: ComposedWeights,
    cache: KVCache,
    kind: LayerKind,
    kernels: Kernels,
    watch: Watch | None = None,
) -> Tensor:
    """The states [B, M, D] after a layer; keys and values are written into ``cache``, which is of this layer alone."""
    seen, w = watch or (lambda name, states: None), cast("Any", weights)  # some are there or not, as others are
    batch, rows, width = hidden.shape
    flat = hidden.reshape(-1, width)

    normed = _norm(flat, w.attn_norm, kind.eps)
    seen("attention", normed)
    heads = (batch, rows, -1, cache.k_cache.shape[3])
    q = _ordered(_norm_heads(kernels.product(normed, w.q, w.q_bias), w.q_norm, kind.eps).view(heads), kind.order)
    k = _ordered(_norm_heads(kernels.product(normed, w.k, w.k_bias), w.k_norm, kind.eps).view(heads), kind.order)
    v = kernels.product(normed, w.v, w.v_bias).view(heads)
    q = rope_kv_append(q, k, v, cache.cos, cache.sin, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)
    attended = kernels.attend(q, cache, kind.window).reshape(batch * rows, -1)
    seen("attended", attended)
    flat = _add(flat, attended, w.o, w.attn_post_norm, kind, kernels)

    normed = _norm(flat, w.mlp_norm, kind.eps)
    seen("feed-forward", normed)
    if w.router is not None:
        out = flat + _norm(_experts(normed, w, kind.layout, kernels), w.mlp_post_norm, kind.eps)
    else:
        inner = kernels.gated(normed, w.gate, w.up, kind.layout.gelu)
        seen("gated", inner)
        out = _add(flat, inner, w.down, w.mlp_post_norm, kind, kernels)
    return out.view(hidden.shape)


def _add(flat: Tensor, x: Tensor, weight: Tensor, norm: Tensor | None, kind: LayerKind, kernels: Kernels) -> Tensor:
    """flat + norm(x weightᵀ), with one rounding where there is no norm in between."""
    if norm is None:
        return kernels.residual(x, weight, flat)
    return flat + _norm(kernels.product(x, weight, None), norm, kind.eps)


def _experts(x: Tensor, w: Any, layout: Layout, kernels: Kernels) -> Tensor:
    """Each row's sum over its experts, from the first to the last, so that it does not depend on the other rows."""
    chances, chosen = kernels.product(x, w.router, None).float().softmax(-1).topk(layout.top_k)
    if layout.shares:
        chances = chances / reduce(torch.add, chances.unbind(1))[:, None]  # a sum in this order, whatever the rows
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = w.experts_in[expert].chunk(2)
        done = kernels.product(kernels.gated(x[rows], gate, up, layout.gelu), w.experts_out[expert], None)
        out[rows] += (done * chances[rows, places, None]).to(x.dtype)
    return out


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Rounded once, at the end, where the weight is in fp32 and x is not."""
    if weight is None:
        return x
    return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)


def _norm_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Of each head, or of all together: as wide as the weight is."""
    return x if weight is None else _norm(x.view(x.shape[0], -1, weight.numel()), weight, eps)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x[..., order]


def _gelu(x: Tensor) -> Tensor:
    """The tanh form. On a CPU torch computes the end of a tensor in another way, so each row is taken alone."""
    if not x.is_cpu or not len(x):
        return F.gelu(x, approximate="tanh")
    return torch.stack([F.gelu(row, approximate="tanh") for row in x])


def attend(q: Tensor, cache: KVCache, window: int | None) -> Tensor:
    """Each row sees the positions up to its own, or the last ``window`` of them.

    A window is copied for each row, from its first position on: so the row's sum is the same whatever is beside it.
    """
    keys, values, lengths = cache.k_cache, cache.v_cache, cache.seq_lens
    if window is None or not _is_reached(window, q, cache):
        return verify_attention(q, keys, values, lengths, cache.slots)
    batch, rows, heads, size = q.shape
    positions = (lengths[:, None] + torch.arange(rows, device=q.device)).flatten()
    slots = torch.arange(batch, device=q.device) if cache.slots is None else cache.slots
    slots, queries = slots.repeat_interleave(rows), q.reshape(-1, 1, heads, size)
    first = (positions - window + 1).clamp_min(0)
    offsets = torch.arange(min(window, keys.shape[2]), device=q.device)
    parts = []
    for begin in range(0, batch * rows, WINDOW_ROWS):
        some = slice(begin, begin + WINDOW_ROWS)
        places = (first[some, None] + offsets).clamp_max(keys.shape[2] - 1)
        own_keys, own_values = (_copied(half, slots[some, None], places) for half in (keys, values))
        parts.append(verify_attention(queries[some], own_keys, own_values, positions[some] - first[some]))
    return torch.cat(parts).view(q.shape)


def _copied(half: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """Some positions [R, W] of some rows [R, 1] of keys or values, [R, G, W, C]."""
    return half.transpose(1, 2)[slots, places].transpose(1, 2).contiguous()


def _is_reached(window: int, q: Tensor, cache: KVCache) -> bool:
    """Whether a row may be past the window. On a card a look at the lengths would be a synchronisation."""
    if cache.k_cache.shape[2] <= window or not q.numel():
        return False
    return not q.is_cpu or int(cache.seq_lens.max()) + q.shape[1] > window


def _attend_prompt(q: Tensor, cache: KVCache, window: int | None) -> Tensor:
    if window is not None:
        return attend(q, cache, window)
    return attend_prompt(q, cache.k_cache, cache.v_cache, cache.seq_lens, int(cache.seq_lens[0])).view(q.shape)


def _residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return linear(x, weight, residual=residual)


def _torch_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual + torch_linear(x, weight)


def _gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return _gelu(linear(x, gate)) * linear(x, up) if gelu else swiglu(x, gate, up)


def _torch_gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    gates = torch_linear(x, gate)
    return (F.gelu(gates, approximate="tanh") if gelu else F.silu(gates)) * torch_linear(x, up)


FEW_ROWS = Kernels(linear, _residual, _gated, attend)
MANY_ROWS = Kernels(torch_linear, _torch_residual, _torch_gated, _attend_prompt)
