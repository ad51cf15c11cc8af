"""The computation of one decoder layer by small ops or by torch, for prompts and for what `partial_forward` lacks.

A row's result does not depend on the rows beside it: the ops guarantee that, sums of two tensors round once per
element, and torch's vectorized functions run on each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import KVCache, LayerWeights, linear, rms_norm, rope_kv_append, swiglu, verify_attention
from layerskip_kernels.formats import plain

from .rotary import Rotary

JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Matrices that some models keep as one parameter, with the rows of one behind those of the other."""
INPUTS = {
    "q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attended",
    "gate": "feed-forward", "up": "feed-forward", "gate_up": "feed-forward", "down": "gated",
}  # fmt: skip
"""The input of each matrix, by the names that `compute_layer` gives to ``watch``. A layer has some of the matrices."""
ATTENTION_ROWS = 64  # of one call on a CPU: its partial results fit the caches
WINDOW_ROWS = 8  # rows whose windows are copied at a time

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [R, D], weight, bias) -> x @ weightᵀ + bias."""
Watch = Callable[[str, Tensor], None]
"""Called with a name in `INPUTS` and that input."""


@dataclass(frozen=True)
class LayerConfig:
    """How the layers of a model compute, beside their weights."""

    eps: float  # of every norm
    rotaries: tuple[Rotary, ...]
    rotary_index: tuple[int, ...] = ()  # of each layer; empty: all have the first
    max_positions: int | None = None  # that are computed as the model does; None: any number
    embedding_scale: float = 1.0  # factor of the first layer's input
    round_embedding_scale: bool = False  # to the dtype of the states, before it is applied
    fused: bool = True  # whether `layerskip_kernels.partial_forward` computes the layers; small ops if not
    # Of layers that are not fused:
    norm_offset: float = 0.0  # added to the weights of norms
    gelu: bool = False  # the tanh form of GELU, not SiLU
    rotary_dim: int | None = None  # the number of values of a head that are rotated; None: all
    windows: tuple[int | None, ...] = ()  # the number of positions that each layer sees, its own included; None: all
    experts_per_token: int = 0
    normalize_experts: bool = False  # whether the weights of a row's experts are scaled to a sum of 1

    @property
    def one_call(self) -> bool:
        """Whether one op computes any number of layers, and with embedding and head a whole round."""
        return self.fused and len(self.rotaries) == 1 and self.embedding_scale == 1.0


class GenericWeights(NamedTuple):
    """The tensors of a layer, with norms before or after attention and feed-forward.

    Shapes as in `layerskip_kernels.LayerWeights`, except that ``q_norm`` and ``k_norm`` may be as wide as all heads.
    Instead of ``gate``, ``up`` and ``down`` there may be N experts: ``router`` [N, D], ``experts_in`` [N, 2 F, D],
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


def split_joined(parameters: Mapping[str, Tensor], keys: int) -> dict[str, Tensor]:
    """Split joined parameters into views of rows; ``keys`` is G C, the rows of k."""
    parts: dict[str, Tensor] = {}
    for name, weight in parameters.items():
        if name not in JOINED:
            parts[name] = weight
            continue
        rows = weight.shape[0]
        sizes = [rows - 2 * keys, keys, keys] if name == "qkv" else [rows // 2, rows - rows // 2]
        parts |= zip(JOINED[name], weight.detach().split(sizes), strict=True)
    return parts


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weightᵀ + bias with torch; a packed weight is unpacked for this call."""
    return F.linear(x, plain(weight, x.shape[-1], x.dtype), bias)


def compute_layer(
    hidden: Tensor,
    weights: GenericWeights | LayerWeights,
    cache: KVCache,
    config: LayerConfig,
    window: int | None = None,
    order: Tensor | None = None,
    past: int | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """The states [B, M, D] after a layer; keys and values are written into ``cache``, which is of this layer alone.

    ``order`` permutes the values of a head, see `pair_order`. With ``past``, which ``cache.seq_lens`` equal, the rows
    are those of prompts: torch computes products and attention. ``watch`` is called with the inputs of matrices.
    """
    seen, eps = watch or (lambda name, states: None), config.eps
    w: Any = GenericWeights(**weights._asdict())
    kernels = FEW_ROWS if past is None else MANY_ROWS
    batch, rows, width = hidden.shape
    flat = hidden.reshape(-1, width)

    def add(flat: Tensor, x: Tensor, weight: Tensor, norm: Tensor | None) -> Tensor:
        """flat + norm(x weightᵀ), with one rounding if there is no norm in between."""
        if norm is None:
            return kernels.residual(x, weight, flat)
        return flat + _norm(kernels.product(x, weight, None), norm, eps)

    normed = _norm(flat, w.attn_norm, eps)
    seen("attention", normed)
    heads = (batch, rows, -1, cache.k_cache.shape[3])
    q = _norm_heads(kernels.product(normed, w.q, w.q_bias), w.q_norm, eps).view(heads)
    k = _norm_heads(kernels.product(normed, w.k, w.k_bias), w.k_norm, eps).view(heads)
    v = kernels.product(normed, w.v, w.v_bias).view(heads)
    if order is not None:
        q, k = q[..., order], k[..., order]
    q = rope_kv_append(q, k, v, cache.cos, cache.sin, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)
    attended = kernels.attend(q, cache, window, past).reshape(batch * rows, -1)
    seen("attended", attended)
    flat = add(flat, attended, w.o, w.attn_post_norm)

    normed = _norm(flat, w.mlp_norm, eps)
    seen("feed-forward", normed)
    if w.router is not None:
        out = flat + _norm(_experts(normed, w, config, kernels), w.mlp_post_norm, eps)
    else:
        inner = kernels.gated(normed, w.gate, w.up, config.gelu)
        seen("gated", inner)
        out = add(flat, inner, w.down, w.mlp_post_norm)
    return out.view(hidden.shape)


def _experts(x: Tensor, w: Any, config: LayerConfig, kernels: Kernels) -> Tensor:
    """Each row's sum over its experts, from the first to the last, so that it does not depend on the other rows."""
    chances, chosen = kernels.product(x, w.router, None).float().softmax(-1).topk(config.experts_per_token)
    if config.normalize_experts:
        chances = chances / reduce(torch.add, chances.unbind(1))[:, None]  # a sum in this order, whatever the rows
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = w.experts_in[expert].chunk(2)
        done = kernels.product(kernels.gated(x[rows], gate, up, config.gelu), w.experts_out[expert], None)
        out[rows] += (done * chances[rows, places, None]).to(x.dtype)
    return out


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm, rounded once at the end if the weight is in fp32 and x is not."""
    if weight is None:
        return x
    return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)


def _norm_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm of each head, or of all together, as wide as the weight."""
    return x if weight is None else _norm(x.view(x.shape[0], -1, weight.numel()), weight, eps)


def _gelu(x: Tensor) -> Tensor:
    """The tanh form. On a CPU torch computes the tail of a tensor differently, so each row is computed alone."""
    if not x.is_cpu or not len(x):
        return F.gelu(x, approximate="tanh")
    return torch.stack([F.gelu(row, approximate="tanh") for row in x])


class Kernels(NamedTuple):
    """Products and attention for a few rows, or for the many of a prompt.

    ``residual`` takes x, a weight and the residual; ``gated`` takes x, gate, up and whether the activation is GELU;
    ``attend`` takes q [B, M, H, C], the cache of one layer, the window and ``past``, and returns [B, M, H C] values.
    """

    product: Product
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    attend: Callable[[Tensor, KVCache, int | None, Any], Tensor]


def attend(q: Tensor, cache: KVCache, window: int | None, past: int | None = None) -> Tensor:
    """Each row sees the positions up to its own, or the last ``window`` of them.

    A window is copied for each row, from its first position on, so that the sum does not depend on other rows.
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
        # Positions [R, W] of rows [R, 1]: [R, G, W, C]
        own_keys, own_values = (
            half.transpose(1, 2)[slots[some, None], places].transpose(1, 2).contiguous() for half in (keys, values)
        )
        parts.append(verify_attention(queries[some], own_keys, own_values, positions[some] - first[some]))
    return torch.cat(parts).view(q.shape)


def _is_reached(window: int, q: Tensor, cache: KVCache) -> bool:
    """Whether a row may be past the window. On a GPU, reading the lengths would synchronize."""
    if cache.k_cache.shape[2] <= window or not q.numel():
        return False
    return not q.is_cpu or int(cache.seq_lens.max()) + q.shape[1] > window


def _attend_prompt(q: Tensor, cache: KVCache, window: int | None, past: int) -> Tensor:
    if window is not None:
        return attend(q, cache, window)
    if q.is_cpu:  # torch's own is two to five times slower there: it does not skip positions that a mask hides
        return attend_in_pieces(q, cache.k_cache, cache.v_cache, cache.seq_lens)
    return attend_masked(q, cache.k_cache, cache.v_cache, past)


def attend_in_pieces(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
    """Use the op for `ATTENTION_ROWS` rows at a time."""
    attended = [
        verify_attention(piece, k_cache, v_cache, seq_lens + i * ATTENTION_ROWS)
        for i, piece in enumerate(q.split(ATTENTION_ROWS, dim=1))
    ]
    return torch.cat(attended, dim=1).flatten(2)


def attend_masked(q: Tensor, k_cache: Tensor, v_cache: Tensor, past: int) -> Tensor:
    """Use torch's attention, up to the last valid position: a mask does not keep NaN beyond it out of V."""
    from torch.nn.attention.bias import causal_lower_right  # which imports torch._dynamo, two seconds

    rows = q.shape[1]
    keys, values = k_cache[:, :, : past + rows], v_cache[:, :, : past + rows]
    # No tensor for a mask: that would rule out flash attention on a GPU.
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=causal_lower_right(rows, past + rows), enable_gqa=True
    )
    return attended.transpose(1, 2).flatten(2)


def _gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return _gelu(linear(x, gate)) * linear(x, up) if gelu else swiglu(x, gate, up)


def _torch_gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    gates = torch_linear(x, gate)
    return (F.gelu(gates, approximate="tanh") if gelu else F.silu(gates)) * torch_linear(x, up)


FEW_ROWS = Kernels(linear, lambda x, weight, residual: linear(x, weight, residual=residual), _gated, attend)
MANY_ROWS = Kernels(
    torch_linear, lambda x, weight, residual: residual + torch_linear(x, weight), _torch_gated, _attend_prompt
)
