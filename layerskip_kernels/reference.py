"""Every op in plain torch: the truth that the other backends are held to.

Products and statistics are taken in fp32 and rounded once, to the dtype of the input, where an op ends. Called with
float64 tensors the same functions compute in float64, which is how they are themselves tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks


def _wide(x: Tensor) -> Tensor:
    """The dtype that accumulates: float64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * _wide(weight)).to(x.dtype)


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    out = _wide(x) @ _wide(weight).T
    if bias is not None:
        out = out + _wide(bias)
    if residual is not None:
        out = out + _wide(residual)
    return out.to(x.dtype)


def swiglu_ref(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    wide = _wide(x)
    return (F.silu(wide @ _wide(gate).T) * (wide @ _wide(up).T)).to(x.dtype)


def _positions(seq_lens: Tensor, rows: int, capacity: int) -> Tensor:
    """Positions [B, M] of a step's rows; raises where one falls outside the cache."""
    positions = seq_lens[:, None] + torch.arange(rows, device=seq_lens.device)
    if seq_lens.device.type == "cpu" and positions.numel():  # on a GPU this would be a host sync
        first, last = int(positions.min()), int(positions.max())
        if first < 0 or last >= capacity:
            raise ValueError(f"position {last if last >= capacity else first} is outside the cache's {capacity}")
    return positions


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves: (a, b) -> (a cos - b sin, b cos + a sin); x [B, M, H, C], cos and sin [B, M, C/2]."""
    first, second = _wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, :, None].to(first.dtype), sin[:, :, None].to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_kv_append_ref(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor
) -> Tensor:
    batch, rows = q.shape[:2]
    positions = _positions(seq_lens, rows, k_cache.shape[2])
    cos, sin = cos[positions], sin[positions]
    sequence = torch.arange(batch, device=q.device)[:, None]
    k_cache[sequence, :, positions] = _rotate(k, cos, sin)
    v_cache[sequence, :, positions] = v
    return _rotate(q, cos, sin)


def verify_attention_ref(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
    batch, rows, heads, size = q.shape
    groups, capacity = k_cache.shape[1:3]
    positions = _positions(seq_lens, rows, capacity)
    seen = torch.arange(capacity, device=q.device) <= positions[:, :, None]  # [B, M, T]
    # Garbage past a sequence's length may be NaN, and 0 * NaN is NaN: it is taken out of V, not only masked.
    written = seen.any(1) if rows else seen.new_zeros(batch, capacity)
    values = torch.where(written[:, None, :, None], _wide(v_cache), 0)  # [B, G, T, C]
    grouped = _wide(q).view(batch, rows, groups, heads // groups, size)
    scores = torch.einsum("bmgrc,bgtc->bgrmt", grouped, _wide(k_cache)) * size**-0.5
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    out = torch.einsum("bgrmt,bgtc->bmgrc", weights, values)
    return out.reshape(batch, rows, heads, size).to(q.dtype)


def exit_head_ref(
    hidden: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    eps: float,
    token_map: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    normed = rms_norm_ref(hidden, norm_weight, eps)
    wide_head = head_weight.to(_wide(normed).dtype)
    logits = _wide(normed) @ wide_head.T  # [R, V]
    if scale is not None:
        logits = logits * scale.to(logits.dtype)
    logit, row = logits.max(-1)
    lse = logits.logsumexp(-1)
    token = row if token_map is None else token_map[row]
    # logsumexp of +inf is +inf, of NaN NaN: such a row names no token
    return torch.where(lse.isfinite(), token, -1), logit, lse


def partial_forward_ref(
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
) -> Tensor:
    slots = _checks.layer_slots(weights, start, end)
    hidden = hidden.clone()
    for offset, layer in enumerate(range(start, end)):
        one = weights[offset * slots : (offset + 1) * slots]
        hidden = _layer(hidden, one, k_cache[layer], v_cache[layer], cos, sin, seq_lens, eps)
    return hidden


def _layer(
    hidden: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    eps: float,
) -> Tensor:
    """One decoder layer as the composition of the ops; every product is rounded to the model's dtype."""
    attn_norm, q_w, k_w, v_w, o_w, mlp_norm, gate, up, down = weights[:9]
    q_bias, k_bias, v_bias, q_norm, k_norm = (w if w.numel() else None for w in weights[9:] or [hidden[:0]] * 5)
    batch, rows, width = hidden.shape
    size = k_cache.shape[3]
    flat = hidden.reshape(-1, width)

    normed = rms_norm_ref(flat, attn_norm, eps)
    q = linear_ref(normed, q_w, q_bias).view(batch, rows, q_w.shape[0] // size, size)
    k = linear_ref(normed, k_w, k_bias).view(batch, rows, k_w.shape[0] // size, size)
    v = linear_ref(normed, v_w, v_bias).view(batch, rows, v_w.shape[0] // size, size)
    q = q if q_norm is None else rms_norm_ref(q, q_norm, eps)
    k = k if k_norm is None else rms_norm_ref(k, k_norm, eps)
    q = rope_kv_append_ref(q, k, v, cos, sin, k_cache, v_cache, seq_lens)
    attended = verify_attention_ref(q, k_cache, v_cache, seq_lens).reshape(batch * rows, q_w.shape[0])
    flat = linear_ref(attended, o_w, residual=flat)
    activated = swiglu_ref(rms_norm_ref(flat, mlp_norm, eps), gate, up)
    return linear_ref(activated, down, residual=flat).view(batch, rows, width)


def draft_loop(
    forward: Callable[..., Tensor],
    head: Callable[..., Sequence[Tensor]],
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
) -> tuple[Tensor, Tensor]:
    """`draft_greedy` out of a backend's own partial_forward and exit_head."""
    if token.device.type == "cpu" and bool((token < 0).any()):  # on a GPU this would be a host sync
        raise ValueError(f"token {int(token.min())} is outside the vocabulary of {embedding.shape[0]}")
    tokens = token.new_empty(token.shape[0], steps)
    states = embedding.new_empty(token.shape[0], steps + extend, embedding.shape[1])
    for row in range(steps + extend):
        hidden = embedding[token.clamp_min(0)][
            :, None
        ]  # what a head without a token leaves is void, but must not index
        hidden = forward(hidden, weights, k_cache, v_cache, cos, sin, seq_lens + row, 0, end, eps)
        states[:, row] = hidden[:, 0]
        if row < steps:
            token = head(hidden[:, 0], norm_weight, head_weight, eps, token_map, scale)[0]
            tokens[:, row] = token
    return tokens, states


def draft_greedy_ref(*args: Any) -> tuple[Tensor, Tensor]:
    return draft_loop(partial_forward_ref, exit_head_ref, *args)


def accept_greedy_ref(draft: Tensor, target: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    drafted = draft.shape[1]
    matches = (draft == target[:, :drafted]) & (draft >= 0)  # a negative draft marks a slot that was not drafted
    accepted = matches.long().cumprod(1).sum(1)
    next_token = target.gather(1, accepted[:, None])[:, 0]
    seq_lens.add_(accepted + 1)
    return accepted, next_token


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueError where a label is neither a token nor ``ignore_index``."""
    if labels.device.type == "cpu":  # on a GPU this would be a host sync
        wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"labels[{row}] is {int(labels[row])}, expected [0, {vocabulary}) or {ignore_index}")


def label_counts(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows have a label [R], and how many do, at least 1: the mean over no labels is 0."""
    valid = labels != ignore_index
    return valid, valid.sum().clamp(min=1)


def rms_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With r = 1/sqrt(mean x^2 + eps) and u = g w: dx = r u - r^3 x mean(u x), dw = sum g r x."""
    wide, wide_grad = _wide(x), _wide(grad)
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = wide_grad * _wide(weight)
    grad_x = inverse * scaled - inverse**3 * wide * (scaled * wide).mean(-1, keepdim=True)
    grad_weight = (wide_grad * inverse * wide).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def early_exit_loss_ref(
    hiddens: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    exit_weights: Tensor,
    eps: float = 1e-5,
    ignore_index: int = -100,
    with_slope: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_labels(labels, head_weight.shape[0], ignore_index)
    logits = _wide(rms_norm_ref(hiddens, norm_weight, eps)) @ _wide(head_weight).T  # [N, R, V]
    _, count = label_counts(labels, ignore_index)
    exit_losses = torch.stack(
        [F.cross_entropy(one, labels, ignore_index=ignore_index, reduction="sum") / count for one in logits]
    )
    slope = hiddens.new_empty(0)
    if with_slope:
        slope = (_softmax_slopes(logits, labels) @ _wide(head_weight)).to(hiddens.dtype)
    return (exit_losses * exit_weights).sum(), exit_losses, logits.logsumexp(-1), slope


def _softmax_slopes(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each row's cross-entropy to its logits, softmax - one-hot, [N, R, V]."""
    return logits.softmax(-1) - F.one_hot(labels.clamp(0), logits.shape[-1])


def early_exit_loss_backward_ref(
    grad: Tensor,
    hiddens: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    exit_weights: Tensor,
    logsumexp: Tensor,
    slope: Tensor,
    eps: float,
    ignore_index: int,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, head = _wide(rms_norm_ref(hiddens, norm_weight, eps)), _wide(head_weight)
    valid, count = label_counts(labels, ignore_index)
    scale = (grad * exit_weights.to(grad.dtype) / count)[:, None] * valid  # [N, R]
    grad_logits = _softmax_slopes(normed @ head.T, labels) * scale[:, :, None]
    grad_hiddens, grad_norm = rms_norm_gradients(grad_logits @ head, hiddens, norm_weight, eps)
    grad_head = torch.einsum("nrv,nrd->vd", grad_logits, normed) if head_grad else head.new_empty(0)
    return grad_hiddens, grad_norm, grad_head.to(head_weight.dtype)
