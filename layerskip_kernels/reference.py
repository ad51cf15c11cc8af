"""Every op in plain torch: the reference for the other backends.

Products and statistics are in fp32 and rounded once, to the dtype of the input, at the end of an op. With float64
tensors the same functions compute in float64, which is how they are tested themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _noise
from .dispatch import implements
from .formats import dequantize
from .schemas import KVCache, LayerWeights, bind, flatten, split_layers
from .speculative import compose_draft, compose_round


def _wide(x: Tensor) -> Tensor:
    """Convert to the dtype of accumulation: float64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _matrix(weight: Tensor, x: Tensor) -> Tensor:
    """A weight, plain or packed, in the dtype of accumulation."""
    return dequantize(weight, x.shape[-1], _wide(x).dtype)


@implements("rms_norm", "reference")
def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * _wide(weight)).to(x.dtype)


@implements("linear", "reference")
def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    out = _wide(x) @ _matrix(weight, x).T
    if bias is not None:
        out = out + _wide(bias)
    if residual is not None:
        out = out + _wide(residual)
    return out.to(x.dtype)


@implements("swiglu", "reference")
def swiglu_ref(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    wide = _wide(x)
    return (F.silu(wide @ _matrix(gate, x).T) * (wide @ _matrix(up, x).T)).to(x.dtype)


def _positions(seq_lens: Tensor, rows: int, capacity: int) -> Tensor:
    """Positions [B, M] of a step's rows; raises if one is outside the cache."""
    _checks.positions(seq_lens, rows, capacity)
    return seq_lens[:, None] + torch.arange(rows, device=seq_lens.device)


def _slots(slots: Tensor | None, batch: int, num_slots: int, device: torch.device) -> Tensor:
    """The slot of each sequence, [B]; raises for duplicates and slots outside the cache."""
    _checks.distinct_slots(slots, num_slots)
    return torch.arange(batch, device=device) if slots is None else slots


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves: (a, b) -> (a cos - b sin, b cos + a sin); x [B, M, H, C], cos and sin [B, M, C/2]."""
    first, second = _wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, :, None].to(first.dtype), sin[:, :, None].to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@implements("rope_kv_append", "reference")
def rope_kv_append_ref(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor,
    slots: Tensor | None = None
) -> Tensor:  # fmt: skip
    batch, rows = q.shape[:2]
    positions = _positions(seq_lens, rows, k_cache.shape[2])
    cos, sin = cos[positions], sin[positions]
    row = _slots(slots, batch, k_cache.shape[0], q.device)[:, None]
    k_cache[row, :, positions] = _rotate(k, cos, sin)
    v_cache[row, :, positions] = v
    return _rotate(q, cos, sin)


@implements("verify_attention", "reference")
def verify_attention_ref(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, slots: Tensor | None = None
) -> Tensor:
    batch, rows, num_heads, head_dim = q.shape
    if slots is not None:
        own = _slots(slots, batch, k_cache.shape[0], q.device)
        k_cache, v_cache = k_cache[own], v_cache[own]
    num_kv_heads, capacity = k_cache.shape[1:3]
    positions = _positions(seq_lens, rows, capacity)
    seen = torch.arange(capacity, device=q.device) <= positions[:, :, None]  # [B, M, T]
    # A hidden value may be NaN or infinite, and 0 times that is NaN: replace it by 0, and set rows that see it to NaN.
    broken = ~v_cache.isfinite()  # [B, G, T, C]
    values = _wide(v_cache).masked_fill(broken, 0)
    grouped = _wide(q).view(batch, rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("bmgrc,bgtc->bgrmt", grouped, _wide(k_cache)) * head_dim**-0.5
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    out = torch.einsum("bgrmt,bgtc->bmgrc", weights, values)
    spoilt = torch.einsum("bmt,bgtc->bmgc", seen.to(values.dtype), broken.to(values.dtype)) > 0
    out = out.masked_fill(spoilt[:, :, :, None], float("nan"))
    return out.reshape(batch, rows, num_heads, head_dim).to(q.dtype)


@implements("exit_head", "reference")
def exit_head_ref(
    hidden: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, token_map: Tensor | None = None,
    scale: Tensor | None = None, temperature: Tensor | None = None, seed: Tensor | None = None,
    offset: Tensor | None = None, logits: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed = rms_norm_ref(hidden, norm_weight, eps)
    scores = _wide(normed) @ _matrix(head_weight, normed).T  # [R, V]
    if scale is not None:
        scores = scores * scale.to(scores.dtype)
    if logits is not None:
        logits.copy_(scores)
    noisy = scores
    if temperature is not None:
        assert seed is not None
        assert offset is not None
        tokens = torch.arange(scores.shape[1], device=scores.device) if token_map is None else token_map
        scores = scores / divisors(temperature)
        noise = _noise.gumbel(seed[:, None], offset[:, None], tokens, _noise.DRAW)
        noisy = torch.where(temperature[:, None] > 0, scores + noise, scores)
    row = noisy.argmax(-1)
    lse = scores.logsumexp(-1)
    token = row if token_map is None else token_map[row]
    # the logsumexp of a row with +inf is +inf, with NaN NaN
    return torch.where(lse.isfinite(), token, -1), scores.gather(1, row[:, None])[:, 0], lse


def divisors(temperature: Tensor) -> Tensor:
    """The divisors of logits, [B, 1]: the temperature, or 1 where it is 0."""
    _checks.temperatures(temperature)
    return torch.where(temperature > 0, temperature, 1)[:, None]


@implements("partial_forward", "reference")
def partial_forward_ref(*args: Any) -> Tensor:
    a = bind("partial_forward", *args)
    hidden = a.hidden.clone()
    for layer, weights in enumerate(split_layers(a.weights, a.start, a.end), a.start):
        cache = KVCache(a.k_cache[layer], a.v_cache[layer], a.cos, a.sin, a.seq_lens, a.slots)
        hidden = _layer(hidden, weights, cache, a.eps)
    return hidden


def _layer(hidden: Tensor, weights: LayerWeights, cache: KVCache, eps: float) -> Tensor:
    """One decoder layer as the composition of the ops; every product is rounded to the model's dtype."""
    batch, rows, hidden_size = hidden.shape
    head_dim, w = cache.k_cache.shape[3], weights
    flat = hidden.reshape(-1, hidden_size)

    normed = rms_norm_ref(flat, w.attn_norm, eps)
    q = linear_ref(normed, w.q, w.q_bias).view(batch, rows, w.q.shape[0] // head_dim, head_dim)
    k = linear_ref(normed, w.k, w.k_bias).view(batch, rows, w.k.shape[0] // head_dim, head_dim)
    v = linear_ref(normed, w.v, w.v_bias).view(batch, rows, w.v.shape[0] // head_dim, head_dim)
    q = q if w.q_norm is None else rms_norm_ref(q, w.q_norm, eps)
    k = k if w.k_norm is None else rms_norm_ref(k, w.k_norm, eps)
    q = rope_kv_append_ref(*flatten("rope_kv_append", cache, q=q, k=k, v=v))
    attended = verify_attention_ref(q, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)
    flat = linear_ref(attended.reshape(batch * rows, w.q.shape[0]), w.o, residual=flat)
    activated = swiglu_ref(rms_norm_ref(flat, w.mlp_norm, eps), w.gate, w.up)
    return linear_ref(activated, w.down, residual=flat).view(batch, rows, hidden_size)


@implements("accept_greedy", "reference")
def accept_greedy_ref(draft: Tensor, target: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    _checks.positions(seq_lens, target.shape[1], 2**63 - 1)
    matches = (draft == target[:, :-1]) & (draft >= 0)  # a negative entry ends the draft
    accepted = matches.long().cumprod(1).sum(1)
    next_token = target.gather(1, accepted[:, None])[:, 0]
    seq_lens.add_(accepted + 1)
    return accepted, next_token


def _log_softmax(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of logits [B, K, V], and [B, K] whether it is finite: not with NaN, +inf or only -inf."""
    lse = scaled.logsumexp(-1, keepdim=True)
    return scaled - lse, lse[..., 0].isfinite()


def _on_vocabulary(log_q: Tensor, token_map: Tensor | None, vocab_size: int) -> Tensor:
    """log q of the draft tokens, [B, K, V_draft] -> [B, K, V], -inf for tokens outside ``token_map``."""
    if token_map is None:
        return log_q
    full = log_q.new_full((*log_q.shape[:2], vocab_size), float("-inf"))
    return full.index_copy(2, token_map, log_q)


def _check_accepted_tokens(draft: Tensor, temperature: Tensor, token_map: Tensor | None, vocab_size: int) -> None:
    """Raise for a token outside the vocabulary, and for a sampled draft that is not in ``token_map``."""
    if draft.device.type != "cpu":  # on a GPU this would be a host sync
        return
    for name, tokens in (("draft", draft), ("token_map", token_map)):
        if tokens is not None and tokens.numel():
            lowest, highest = int(tokens.min()), int(tokens.max())
            if highest >= vocab_size or (lowest < 0 and name == "token_map"):
                token = highest if highest >= vocab_size else lowest
                raise ValueError(f"{name} holds {token}, the vocabulary of target_logits has {vocab_size}")
    if token_map is not None:
        outside = ~torch.isin(draft, token_map) & (draft >= 0) & (temperature[:, None] > 0)
        if outside.any():
            b, i = outside.nonzero()[0].tolist()
            raise ValueError(f"draft[{b}, {i}] is {int(draft[b, i])}, which is not in token_map")


@implements("accept_sampled", "reference")
def accept_sampled_ref(
    draft: Tensor, draft_logits: Tensor, target_logits: Tensor, seq_lens: Tensor, temperature: Tensor, seed: Tensor,
    token_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_speculations = draft.shape
    vocab_size = target_logits.shape[2]
    _checks.positions(seq_lens, num_speculations + 1, 2**63 - 1)
    _check_accepted_tokens(draft, temperature, token_map, vocab_size)
    sampled, by = temperature[:, None] > 0, divisors(temperature)[:, :, None]
    scaled = target_logits / by
    log_p, valid_p = _log_softmax(scaled)
    log_q, valid_q = _log_softmax(draft_logits / by)
    log_q = _on_vocabulary(log_q, token_map, vocab_size)
    valid = valid_p.clone()
    valid[:, :num_speculations] &= valid_q | (draft < 0) | ~sampled
    best = scaled.argmax(-1)  # [B, K + 1]; log_p might tie by rounding

    index = draft.clamp_min(0)[:, :, None]
    log_ratio = (log_p[:, :num_speculations].gather(2, index) - log_q.gather(2, index))[:, :, 0]
    offsets = seq_lens[:, None] + torch.arange(num_speculations, device=draft.device)
    log_u = _noise.uniform(seed[:, None], offsets, torch.zeros_like(offsets), _noise.ACCEPT).log()
    agrees = torch.where(sampled, log_u < log_ratio, draft == best[:, :num_speculations])
    accepted = (agrees & (draft >= 0) & valid[:, :num_speculations]).long().cumprod(1).sum(1)

    def last(rows: Tensor) -> Tensor:  # the row after the accepted draft tokens
        return rows[torch.arange(batch, device=rows.device), accepted.clamp_max(rows.shape[1] - 1)]

    final = last(scaled)  # [B, V]
    if num_speculations:
        rejected = (accepted < num_speculations) & (last(draft) >= 0)
        residual = (last(log_p).exp() - last(log_q).exp()).clamp_min(0).log()
        usable = rejected & (residual > float("-inf")).any(-1)  # it may round to nothing
        final = torch.where(usable[:, None], residual, final)
    every = torch.arange(vocab_size, device=draft.device)
    noise = _noise.gumbel(seed[:, None], (seq_lens + accepted)[:, None], every, _noise.RESIDUAL)
    token = torch.where(sampled[:, 0], (final + noise).argmax(-1), last(best))
    seq_lens.add_(accepted + 1)
    return accepted, torch.where(last(valid), token, -1)


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise ValueError for a label that is neither a token nor ``ignore_index``."""
    if labels.device.type == "cpu":  # on a GPU this would be a host sync
        wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"labels[{row}] is {int(labels[row])}, expected [0, {vocab_size}) or {ignore_index}")


def label_counts(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows have a label [R], and their number, at least 1 so that the mean over no labels is 0."""
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


@implements("early_exit_loss", "reference")
def early_exit_loss_ref(
    hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor, eps: float = 1e-5,
    ignore_index: int = -100, with_slope: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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


@implements("early_exit_loss_backward", "reference")
def early_exit_loss_backward_ref(
    grad: Tensor, hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor,
    logsumexp: Tensor, slope: Tensor, eps: float, ignore_index: int, head_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed, head = _wide(rms_norm_ref(hiddens, norm_weight, eps)), _wide(head_weight)
    valid, count = label_counts(labels, ignore_index)
    scale = (grad * exit_weights.to(grad.dtype) / count)[:, None] * valid  # [N, R]
    grad_logits = _softmax_slopes(normed @ head.T, labels) * scale[:, :, None]
    grad_hiddens, grad_norm = rms_norm_gradients(grad_logits @ head, hiddens, norm_weight, eps)
    grad_head = torch.einsum("nrv,nrd->vd", grad_logits, normed) if head_grad else head.new_empty(0)
    return grad_hiddens, grad_norm, grad_head.to(head_weight.dtype)


_OPS = {
    "partial_forward": partial_forward_ref,
    "exit_head": exit_head_ref,
    "accept_greedy": accept_greedy_ref,
    "accept_sampled": accept_sampled_ref,
}


@implements("draft", "reference")
def draft_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return compose_draft(_OPS, *args)


@implements("speculative_round", "reference")
def speculative_round_ref(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return compose_round({**_OPS, "draft": draft_ref}, *args)
