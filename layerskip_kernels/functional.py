"""The public ops of one step; drafting and rounds are in `speculative`.

Letters: B sequences, M rows per sequence, R = B M rows, D hidden, H query heads, G key/value heads, C head size,
F feed-forward, V vocabulary, T cache capacity, L layers, K draft tokens.

Weights of matmuls may be packed (`formats`). Floating inputs of one call share one dtype, fp32, bf16 or fp16; all
tensors share one device. Weights and caches must be contiguous, activations need not be. A row's result does not
depend, bitwise, on the other rows and sequences. Every function raises ValueError (shape, stride, device, range) or
TypeError (dtype) with the offending value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import layer_weights as check_layer_weights  # noqa: F401  (public here)
from .dispatch import call
from .schemas import EarlyExitLossOutput, ExitOutput, KVCache, flatten


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), statistics in fp32.

    Parameters
    ----------
    x : Tensor [..., D]
    weight : Tensor [D]
    eps : float

    Returns
    -------
    Tensor [..., D]
    """
    return call("rms_norm", x, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Skinny matmul x weightᵀ + bias + residual; weights are streamed once for all rows, one rounding at the end.

    Parameters
    ----------
    x : Tensor [R, D_in]
    weight : Tensor [D_out, D_in]
    bias : Tensor [D_out], optional
    residual : Tensor [R, D_out], optional

    Returns
    -------
    Tensor [R, D_out]
    """
    return call("linear", x, weight, bias, residual)


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Gated unit silu(x gateᵀ) · (x upᵀ) (Shazeer 2020), one rounding at the end.

    Parameters
    ----------
    x : Tensor [R, D]
    gate, up : Tensor [F, D]

    Returns
    -------
    Tensor [R, F]
    """
    return call("swiglu", x, gate, up)


def rope_kv_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor,
    slots: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Rotate q and k (RoPE on halves, Su et al. 2021), write k and v at ``seq_lens[b] + m``, in place.

    Parameters
    ----------
    q : Tensor [B, M, H, C]
    k, v : Tensor [B, M, G, C]
    cos, sin : Tensor [≥ T, C/2], fp32
        One row per position.
    k_cache, v_cache : Tensor [B, G, T, C]
        Written in place.
    seq_lens : Tensor [B], int64
    slots : Tensor [B], int64, optional
        The cache row of each sequence, no duplicates; the cache may then have any number of rows instead of B.

    Returns
    -------
    Tensor [B, M, H, C]
        The rotated queries.
    """
    return call("rope_kv_append", q, k, v, cos, sin, k_cache, v_cache, seq_lens, slots)


def verify_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, slots: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention of M new rows over the cache that already holds their keys and values.

    Row m of sequence b is at position ``seq_lens[b] + m`` and sees positions up to its own; later ones are never read.

    Parameters
    ----------
    q : Tensor [B, M, H, C]
    k_cache, v_cache : Tensor [B, G, T, C]
    seq_lens : Tensor [B], int64
        Lengths before this step.
    slots : Tensor [B], int64, optional
        The cache row of each sequence, no duplicates; the cache may then have any number of rows instead of B.

    Returns
    -------
    Tensor [B, M, H, C]
    """
    return call("verify_attention", q, k_cache, v_cache, seq_lens, slots)


def exit_head(
    hidden: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, token_map: Tensor | None = None,
    scale: Tensor | None = None, temperature: Tensor | None = None, seed: Tensor | None = None,
    offset: Tensor | None = None, logits: Tensor | None = None
) -> ExitOutput:  # fmt: skip
    """Final norm, head, arg-max or sample, and log-sum-exp in one pass over the head, without writing logits.

    A sample is the arg-max of logits / temperature + Gumbel noise (Gumbel-max, Maddison et al. 2014). The noise depends
    on ``seed``, ``offset`` and the token alone (Philox4x32-10, Salmon et al. 2011): the same seed and position give the
    same sample, whatever the other rows are.

    Parameters
    ----------
    hidden : Tensor [R, D]
    norm_weight : Tensor [D]
    head_weight : Tensor [V, D]
        In the dtype of ``hidden``, packed, or int8 with ``scale``.
    eps : float
    token_map : Tensor [V], int64, optional
        The token of each row of ``head_weight``; by default the row's index.
    scale : Tensor [V], fp32, optional
        One factor per row of an int8 head: logit = scale · Σ x · weight.
    temperature : Tensor [R], fp32, optional
        Finite, at least 0; 0 is greedy.
    seed, offset : Tensor [R], int64, optional
        Index the noise; ``offset`` is the row's position. Required with a temperature, and only then.
    logits : Tensor [R, V], fp32, optional
        Output buffer for the raw logits, before the temperature. Each row is contiguous; rows may be strided.

    Returns
    -------
    ExitOutput
        Ties go to the lowest row. Token -1 marks a row whose logits are not finite, or overflow when divided by the
        temperature. For a sampled row ``logit`` and ``logsumexp`` are those of logits / temperature, so
        ``exp(logit - logsumexp)`` is the probability it was drawn with.
    """
    return ExitOutput(
        *call("exit_head", hidden, norm_weight, head_weight, eps, token_map, scale, temperature, seed, offset, logits)
    )


def partial_forward(
    hidden: Tensor, weights: Sequence[Tensor], cache: KVCache, start: int, end: int, eps: float
) -> Tensor:
    """Layers [start, end) of a pre-norm decoder as one call; keys and values are written into the cache in place.

    A layer is, bit for bit, the composition of this module's ops: rms_norm, linear (q, k, v), optional rms_norm of q
    and k, rope_kv_append, verify_attention, linear + residual, rms_norm, swiglu, linear + residual. So [0, E) followed
    by [E, L) equals [0, L).

    Parameters
    ----------
    hidden : Tensor [B, M, D]
        State before layer ``start``.
    weights : sequence of Tensor
        The tensors of `LayerWeights` for each of the layers [start, end): the required ones, or all of them, with an
        empty tensor for one that the model does not have.
    cache : KVCache
        Of all L layers; keys and values are written at ``seq_lens[b] + m``. ``seq_lens`` is not advanced.
    start, end : int
    eps : float
        Of every norm.

    Returns
    -------
    Tensor [B, M, D]
        State after layer ``end - 1``.
    """
    args = flatten("partial_forward", cache, hidden=hidden, weights=weights, start=start, end=end, eps=eps)
    return call("partial_forward", *args)


def early_exit_loss(
    hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor, eps: float = 1e-5,
    ignore_index: int = -100
) -> EarlyExitLossOutput:  # fmt: skip
    """Σ weightₙ · mean cross-entropy of exit n (LayerSkip, arXiv 2404.16710, §4.1.2), logits never written in full.

    All exits share the norm and the head. Differentiable once in ``hiddens``, ``norm_weight``, ``head_weight`` and
    ``exit_weights``; a head without ``requires_grad`` gets no gradient and saves its cost. Under autocast, floating
    inputs of different dtypes are cast to autocast's.

    Parameters
    ----------
    hiddens : Tensor [N, R, D]
        State after each exit's layer, before the final norm. May be float64.
    norm_weight : Tensor [D]
    head_weight : Tensor [V, D]
    labels : Tensor [R], int64
        The token that each row should predict, or ``ignore_index`` to leave the row out of the mean. The mean over no
        rows is 0.
    exit_weights : Tensor [N], fp32
    eps : float
    ignore_index : int
        Negative.

    Returns
    -------
    EarlyExitLossOutput
        In fp32. ``exit_losses`` are for reports: a gradient of them raises.
    """
    device = hiddens.device.type
    if torch.is_autocast_enabled(device) and len({hiddens.dtype, norm_weight.dtype, head_weight.dtype}) > 1:
        dtype = torch.get_autocast_dtype(device)
        hiddens, norm_weight, head_weight = hiddens.to(dtype), norm_weight.to(dtype), head_weight.to(dtype)
    # Computing the gradient of hiddens in the forward saves the backward a pass over the head. The CPU always gains:
    # its backward can then compute the head's gradient in one product for all rows.
    profits = device == "cpu" or not head_weight.requires_grad
    with_slope = torch.is_grad_enabled() and hiddens.requires_grad and profits
    args = (hiddens, norm_weight, head_weight, labels, exit_weights, eps, ignore_index, with_slope)
    loss, exit_losses, *_ = call("early_exit_loss", *args)
    if loss.requires_grad and not torch.compiler.is_compiling():
        exit_losses = _Detached.apply(exit_losses, torch.zeros((), requires_grad=True))
    return EarlyExitLossOutput(loss, exit_losses)


class _Detached(torch.autograd.Function):
    """Return ``values``; a gradient of them raises instead of being left out without a word. ``leaf`` is any leaf."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, leaf: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        if not grad.any():  # of functions that pass all outputs of a module through, such as DDP's
            return None, None
        raise RuntimeError(
            "exit_losses of early_exit_loss are detached; take the gradient of loss, and choose exits by exit_weights"
        )
