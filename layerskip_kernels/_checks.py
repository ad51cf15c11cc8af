"""Argument checks, one function per op; the only place where the ops' messages are written.

The public op and its fake both call them, so a wrong call fails with the same words eagerly and under
``torch.compile``. They look at shapes, dtypes, devices and strides alone, never at values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import FLOATS, cache_slots, dense, require, same_device, sampling, shaped, written

LAYER_SLOTS = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
OPTIONAL_SLOTS = ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    require(x.dim() >= 1, "x must have at least one dimension")
    shaped("x", x, [None] * x.dim(), FLOATS)
    shaped("weight", weight, [x.shape[-1]], [x.dtype])
    require(eps >= 0, f"eps must not be negative, got {eps}")
    dense(weight=weight)
    same_device(x, weight=weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    shaped("x", x, [None, None], FLOATS)
    shaped("weight", weight, [None, x.shape[1]], [x.dtype])
    if bias is not None:
        shaped("bias", bias, [weight.shape[0]], [x.dtype])
    if residual is not None:
        shaped("residual", residual, [x.shape[0], weight.shape[0]], [x.dtype])
    dense(weight=weight, bias=bias)
    same_device(x, weight=weight, bias=bias, residual=residual)


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> None:
    shaped("x", x, [None, None], FLOATS)
    shaped("gate", gate, [None, x.shape[1]], [x.dtype])
    shaped("up", up, list(gate.shape), [x.dtype])
    dense(gate=gate, up=up)
    same_device(x, gate=gate, up=up)


def head_size(size: int) -> None:
    require(size % 8 == 0 and 8 <= size <= 256, f"head size must be a multiple of 8 up to 256, got {size}")


def _cache(
    like: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    batch: int,
    rows: int,
    size: int,
    slots: Tensor | None,
) -> None:
    """The cache of one layer, [B, G, T, C] or, with slots, [S, G, T, C], twice; and the lengths."""
    shaped("k_cache", k_cache, [batch if slots is None else None, None, None, size], [like.dtype])
    shaped("v_cache", v_cache, list(k_cache.shape), [like.dtype])
    shaped("seq_lens", seq_lens, [batch], [torch.int64])
    cache_slots(slots, batch, k_cache.shape[0])
    dense(k_cache=k_cache, v_cache=v_cache, seq_lens=seq_lens)
    capacity = k_cache.shape[2]
    require(rows <= capacity, f"{rows} rows do not fit a cache of capacity {capacity}")
    same_device(like, k_cache=k_cache, v_cache=v_cache, seq_lens=seq_lens, slots=slots)


def _rope(cos: Tensor, sin: Tensor, capacity: int, size: int) -> None:
    shaped("cos", cos, [None, size // 2], [torch.float32])
    shaped("sin", sin, list(cos.shape), [torch.float32])
    require(cos.shape[0] >= capacity, f"cos has {cos.shape[0]} positions, the cache's capacity is {capacity}")
    dense(cos=cos, sin=sin)


def rope_kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    slots: Tensor | None = None,
) -> None:
    shaped("q", q, [None] * 4, FLOATS)
    batch, rows, _, size = q.shape
    head_size(size)
    shaped("k", k, [batch, rows, None, size], [q.dtype])
    shaped("v", v, list(k.shape), [q.dtype])
    _cache(q, k_cache, v_cache, seq_lens, batch, rows, size, slots)
    require(k_cache.shape[1] == k.shape[2], f"k has {k.shape[2]} key/value heads, the cache {k_cache.shape[1]}")
    _rope(cos, sin, k_cache.shape[2], size)
    same_device(q, k=k, v=v, cos=cos, sin=sin)


def verify_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, slots: Tensor | None = None
) -> None:
    shaped("q", q, [None] * 4, FLOATS)
    batch, rows, heads, size = q.shape
    head_size(size)
    _cache(q, k_cache, v_cache, seq_lens, batch, rows, size, slots)
    groups = k_cache.shape[1]
    require(
        groups > 0 and heads % groups == 0,
        f"{heads} query heads are not a multiple of {groups} key/value heads",
    )


def exit_head(
    hidden: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    eps: float,
    token_map: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    logits: Tensor | None = None,
) -> None:
    shaped("hidden", hidden, [None, None], FLOATS)
    shaped("norm_weight", norm_weight, [hidden.shape[1]], [hidden.dtype])
    require(eps >= 0, f"eps must not be negative, got {eps}")
    dense(norm_weight=norm_weight)
    same_device(hidden, norm_weight=norm_weight)
    _head(hidden, head_weight=head_weight, token_map=token_map, scale=scale)
    if logits is not None:
        written("logits", logits, [hidden.shape[0], head_weight.shape[0]])
        same_device(hidden, logits=logits)
    if temperature is not None or seed is not None or offset is not None:
        sampling(hidden, hidden.shape[0], temperature=temperature, seed=seed, offset=offset)


def _head(hidden: Tensor, **named: Tensor | None) -> None:
    """The weight of a head for ``hidden``, its token map and its scale, in this order, by their names."""
    (name, weight), (map_name, token_map), (scale_name, scale) = named.items()
    assert weight is not None
    shaped(name, weight, [None, hidden.shape[1]], [hidden.dtype if scale is None else torch.int8])
    require(weight.shape[0] > 0, f"{name} has no rows")
    if token_map is not None:
        shaped(map_name, token_map, [weight.shape[0]], [torch.int64])
    if scale is not None:
        shaped(scale_name, scale, [weight.shape[0]], [torch.float32])
    dense(**named)
    same_device(hidden, **named)


def layer_slots(weights: Sequence[Tensor], start: int, end: int) -> int:
    """How many tensors describe a layer: the nine required ones, or with the five optional ones."""
    layers = end - start
    plain, full = len(LAYER_SLOTS), len(LAYER_SLOTS) + len(OPTIONAL_SLOTS)
    if layers == 0 and not weights:
        return plain
    for slots in (plain, full):
        if len(weights) == layers * slots:
            return slots
    raise ValueError(
        f"layers [{start}, {end}) take {plain} or {full} weights each, got {len(weights)} for {layers} layers"
    )


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
) -> None:
    shaped("hidden", hidden, [None] * 3, FLOATS)
    batch, rows, _ = hidden.shape
    shaped("k_cache", k_cache, [None] * 5, [hidden.dtype])
    depth, size = k_cache.shape[0], k_cache.shape[4]
    require(0 <= start <= end <= depth, f"layers [{start}, {end}) are not within the cache's {depth} layers")
    head_size(size)
    require(eps >= 0, f"eps must not be negative, got {eps}")
    shaped("k_cache", k_cache, [depth, batch if slots is None else None, None, None, size], [hidden.dtype])
    shaped("v_cache", v_cache, list(k_cache.shape), [hidden.dtype])
    shaped("seq_lens", seq_lens, [batch], [torch.int64])
    cache_slots(slots, batch, k_cache.shape[1])
    capacity = k_cache.shape[3]
    require(rows <= capacity, f"{rows} rows do not fit a cache of capacity {capacity}")
    _rope(cos, sin, capacity, size)
    dense(k_cache=k_cache, v_cache=v_cache, seq_lens=seq_lens)
    same_device(hidden, k_cache=k_cache, v_cache=v_cache, cos=cos, sin=sin, seq_lens=seq_lens, slots=slots)
    _layers(hidden, weights, layer_slots(weights, start, end), k_cache.shape[2], size)


def _layers(hidden: Tensor, weights: Sequence[Tensor], slots: int, groups: int, size: int) -> None:
    """The first layer's tensors fit the states and the cache, the others are shaped like it."""
    names, like = LAYER_SLOTS + OPTIONAL_SLOTS, weights[:slots]
    if weights:
        layer_weights(like, hidden.shape[2], groups, size, hidden.dtype)
    for index, tensor in enumerate(weights):
        name, first = names[index % slots], like[index % slots]
        if name not in OPTIONAL_SLOTS or (tensor.numel() and first.numel()):
            shaped(name, tensor, list(first.shape), [hidden.dtype])
        dense(**{name: tensor})
        same_device(hidden, **{name: tensor})


def draft(
    token: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    end: int,
    norm_weight: Tensor,
    head_weight: Tensor,
    eps: float,
    steps: int,
    extend: bool,
    token_map: Tensor | None = None,
    scale: Tensor | None = None,
    slots: Tensor | None = None,
    min_probability: float = 0.0,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    logits: Tensor | None = None,
) -> None:
    _drafting(token, embedding, steps, min_probability)
    require(end >= 1, f"end must be at least 1, got {end}")
    batch, rows = token.shape[0], steps + extend
    state = embedding[0]
    partial_forward(state.expand(batch, rows, -1), weights, k_cache, v_cache, cos, sin, seq_lens, 0, end, eps, slots)
    exit_head(state.expand(batch * rows, -1), norm_weight, head_weight, eps, token_map, scale)
    if logits is not None:
        written("logits", logits, [batch, steps, head_weight.shape[0]])
        same_device(embedding, logits=logits)
    if temperature is not None or seed is not None:
        sampling(embedding, batch, temperature=temperature, seed=seed)


def _drafting(token: Tensor, embedding: Tensor, steps: int, min_probability: float) -> None:
    shaped("token", token, [None], [torch.int64])
    shaped("embedding", embedding, [None, None], FLOATS)
    require(embedding.shape[0] > 0, "embedding has no rows")
    require(steps >= 0, f"steps must not be negative, got {steps}")
    require(0 <= min_probability <= 1, f"min_probability must lie in [0, 1], got {min_probability}")
    dense(embedding=embedding)
    same_device(embedding, token=token)


def layer_weights(weights: Sequence[Tensor], hidden: int, groups: int, size: int, dtype: torch.dtype) -> None:
    """Check one layer's tensors, in the order of LAYER_SLOTS + OPTIONAL_SLOTS (absent: no elements)."""
    layer_slots(weights, 0, 1)
    named = dict(zip(LAYER_SLOTS + OPTIONAL_SLOTS, weights, strict=False))
    queries, features = named["q"].shape[0], named["gate"].shape[0]
    require(queries % (groups * size) == 0, f"q has {queries} rows, not a multiple of {groups} heads of size {size}")
    shapes: dict[str, list[int]] = {
        "attn_norm": [hidden], "q": [queries, hidden], "k": [groups * size, hidden], "v": [groups * size, hidden],
        "o": [hidden, queries], "mlp_norm": [hidden], "gate": [features, hidden], "up": [features, hidden],
        "down": [hidden, features], "q_bias": [queries], "k_bias": [groups * size], "v_bias": [groups * size],
        "q_norm": [size], "k_norm": [size],
    }  # fmt: skip
    for name, tensor in named.items():
        if name in OPTIONAL_SLOTS and tensor.numel() == 0:
            continue
        shaped(name, tensor, shapes[name], [dtype])
    dense(**named)


def accept_greedy(draft: Tensor, target: Tensor, seq_lens: Tensor) -> None:
    shaped("draft", draft, [None, None], [torch.int64])
    batch, drafted = draft.shape
    shaped("target", target, [batch, drafted + 1], [torch.int64])
    shaped("seq_lens", seq_lens, [batch], [torch.int64])
    dense(seq_lens=seq_lens)
    same_device(draft, target=target, seq_lens=seq_lens)


def accept_sampled(
    draft: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor,
    seq_lens: Tensor,
    temperature: Tensor,
    seed: Tensor,
    token_map: Tensor | None = None,
) -> None:
    shaped("draft", draft, [None, None], [torch.int64])
    batch, drafted = draft.shape
    shaped("draft_logits", draft_logits, [batch, drafted, None], [torch.float32])
    shaped("target_logits", target_logits, [batch, drafted + 1, None], [torch.float32])
    shaped("seq_lens", seq_lens, [batch], [torch.int64])
    scored, vocabulary = draft_logits.shape[2], target_logits.shape[2]
    require(vocabulary > 0, "target_logits has no tokens")
    if token_map is not None:
        shaped("token_map", token_map, [scored], [torch.int64])
    else:
        require(
            scored == vocabulary,
            f"draft_logits has {scored} tokens, target_logits {vocabulary}: without a token_map they must agree",
        )
    dense(seq_lens=seq_lens, token_map=token_map)
    same_device(draft, draft_logits=draft_logits, target_logits=target_logits, seq_lens=seq_lens, token_map=token_map)
    sampling(draft, batch, temperature=temperature, seed=seed)


def speculative_round(
    token: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    exit_layer: int,
    norm_weight: Tensor,
    head_weight: Tensor,
    eps: float,
    steps: int,
    draft_weight: Tensor | None = None,
    draft_map: Tensor | None = None,
    draft_scale: Tensor | None = None,
    slots: Tensor | None = None,
    min_probability: float = 0.0,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    _drafting(token, embedding, steps, min_probability)
    shaped("k_cache", k_cache, [None] * 5, [embedding.dtype])
    depth, batch, state = k_cache.shape[0], token.shape[0], embedding[0]
    require(1 <= exit_layer <= depth, f"exit_layer must lie in [1, {depth}], got {exit_layer}")
    states = state.expand(batch, steps + 1, -1)
    partial_forward(states, weights, k_cache, v_cache, cos, sin, seq_lens, 0, depth, eps, slots)
    exit_head(state.expand(batch, -1), norm_weight, head_weight, eps)
    if draft_weight is None:
        given = [name for name, arg in (("draft_map", draft_map), ("draft_scale", draft_scale)) if arg is not None]
        require(not given, f"{', '.join(given)} needs a draft_weight")
    else:
        _head(state[None], draft_weight=draft_weight, draft_map=draft_map, draft_scale=draft_scale)
        require(
            temperature is None or draft_map is not None or draft_weight.shape[0] == head_weight.shape[0],
            f"draft_weight has {draft_weight.shape[0]} rows, head_weight {head_weight.shape[0]}: "
            "to sample without a draft_map they must agree",
        )
    if temperature is not None or seed is not None:
        sampling(embedding, batch, temperature=temperature, seed=seed)
        require(
            min_probability == 0,
            f"min_probability is {min_probability} with a temperature: dropping what was drawn because it is "
            "improbable would change the distribution",
        )


def early_exit_loss(
    hiddens: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    exit_weights: Tensor,
    eps: float = 1e-5,
    ignore_index: int = -100,
    with_slope: bool = False,
) -> None:
    shaped("hiddens", hiddens, [None] * 3, (*FLOATS, torch.float64))  # float64 is what gradients are checked in
    exits, rows, width = hiddens.shape
    require(exits > 0, "hiddens has no exit, its shape is " + str(list(hiddens.shape)))
    shaped("norm_weight", norm_weight, [width], [hiddens.dtype])
    shaped("head_weight", head_weight, [None, width], [hiddens.dtype])
    require(head_weight.shape[0] > 0, "head_weight has no rows")
    shaped("labels", labels, [rows], [torch.int64])
    shaped("exit_weights", exit_weights, [exits], [torch.float32, torch.float64])
    require(eps >= 0, f"eps must not be negative, got {eps}")
    require(ignore_index < 0, f"ignore_index must be negative, as no token is, got {ignore_index}")
    dense(norm_weight=norm_weight, head_weight=head_weight)
    same_device(hiddens, norm_weight=norm_weight, head_weight=head_weight, labels=labels, exit_weights=exit_weights)


def early_exit_loss_backward(
    grad: Tensor, hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor,
    logsumexp: Tensor, slope: Tensor, eps: float, ignore_index: int, head_grad: bool,
) -> None:  # fmt: skip
    early_exit_loss(hiddens, norm_weight, head_weight, labels, exit_weights, eps, ignore_index)
    shaped("grad", grad, [], [torch.float32, torch.float64])
    shaped("logsumexp", logsumexp, list(hiddens.shape[:2]), [torch.float32, torch.float64])
    if slope.numel():
        shaped("slope", slope, list(hiddens.shape), [hiddens.dtype])
