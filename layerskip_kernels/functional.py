"""The documented public ops of one step; drafting and rounds are in `rounds`.

Letters: B sequences, M rows per sequence, R = B M rows, D hidden, H query heads, G key/value heads, C head size,
F feed-forward, V vocabulary, T cache capacity, L layers, K draft tokens.

Weights of matmuls may be packed, see `formats`. Floating inputs of one call share one dtype out of fp32, bf16 and fp16;
all tensors share one device. Weights and caches must be contiguous, activations need not be. What a row yields does not
depend, bitwise, on how many rows or sequences travel with it. Every function raises ValueError (shape, stride, device,
range) or TypeError (dtype) with the offending value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    slots: Tensor | None = None,
) -> Tensor:
    """Rotate q and k (RoPE on halves, Su et al. 2021), write k and v at ``seq_lens[b] + m``, in place.

    Parameters
    ----------
    q : Tensor [B, M, H, C]
    k, v : Tensor [B, M, G, C]
    cos, sin : Tensor [≥ T, C/2], fp32
        One row a position.
    k_cache, v_cache : Tensor [B, G, T, C]
        Written in place.
    seq_lens : Tensor [B], int64
    slots : Tensor [B], int64, optional
        The cache row of each sequence, all different; the cache then has any number of rows in the place of B.

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

    Row m of sequence b sits at ``seq_lens[b] + m`` and sees positions up to and including its own; what lies beyond is
    never read.

    Parameters
    ----------
    q : Tensor [B, M, H, C]
    k_cache, v_cache : Tensor [B, G, T, C]
    seq_lens : Tensor [B], int64
        Lengths before this step.
    slots : Tensor [B], int64, optional
        The cache row of each sequence, all different; the cache then has any number of rows in the place of B.

    Returns
    -------
    Tensor [B, M, H, C]
    """
    return call("verify_attention", q, k_cache, v_cache, seq_lens, slots)


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
) -> ExitOutput:
    """Final norm, head, arg-max or sample, and log-sum-exp in one pass over the head; no logits, unless asked for.

    A sample is the arg-max of logits / temperature + Gumbel noise (Gumbel-max, Maddison et al. 2014), drawn with its
    exact probability. The noise is a function of ``seed``, ``offset`` and the token alone (Philox4x32-10, Salmon et al.
    2011), so a row's sample does not depend on the other rows, and the same seed and position give the same sample.

    Parameters
    ----------
    hidden : Tensor [R, D]
    norm_weight : Tensor [D]
    head_weight : Tensor [V, D]
        The rows to score, in the dtype of ``hidden``, or int8 together with ``scale``.
    eps : float
    token_map : Tensor [V], int64, optional
        The token that each row of ``head_weight`` stands for; without it a row stands for its index.
    scale : Tensor [V], fp32, optional
        One factor a row of an int8 head: logit = scale · Σ x · weight.
    temperature : Tensor [R], fp32, optional
        Finite, at least 0. Where it is 0 the row is greedy.
    seed, offset : Tensor [R], int64
        What names a row's noise; ``offset`` is the row's position. With a temperature, and only with one.
    logits : Tensor [R, V], fp32, optional
        Output buffer for the raw logits, before the temperature. Its rows are contiguous, but may lie apart.

    Returns
    -------
    ExitOutput
        Ties go to the lowest row. Token -1 marks a row whose logits are not finite, or overflow when they are divided
        by its temperature. Of a sampled row ``logit`` and ``logsumexp`` are those of logits / temperature, so
        ``exp(logit - logsumexp)`` is what it was drawn with.
    """
    return ExitOutput(
        *call("exit_head", hidden, norm_weight, head_weight, eps, token_map, scale, temperature, seed, offset, logits)
    )


def partial_forward(
    hidden: Tensor, weights: Sequence[Tensor], cache: KVCache, start: int, end: int, eps: float
) -> Tensor:
    """Layers [start, end) of a pre-norm decoder as one call; keys and values are written into the cache in place.

    A layer is the composition of this module's ops, bit for bit: rms_norm, linear (q, k, v), rms_norm of q and k where
    the model has it, rope_kv_append, verify_attention, linear + residual, rms_norm, swiglu, linear + residual. So a
    forward of [0, L) equals one of [0, E) followed by one of [E, L).

    Parameters
    ----------
    hidden : Tensor [B, M, D]
        State before layer ``start``.
    weights : sequence of Tensor
        Of the layers [start, end) in order, for each the tensors of `LayerWeights`: the required ones, or all, where
        one that the model does not have is a tensor without elements.
    cache : KVCache
        Of all L layers; keys and values are written at ``seq_lens[b] + m``. Lengths are not advanced.
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


def check_layer_weights(
    weights: Sequence[Tensor], hidden_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Check the tensors of one layer as `partial_forward` takes them.

    Parameters
    ----------
    weights : sequence of Tensor
        Those of `LayerWeights`, with or without the optional ones; an optional one without elements is absent.
    hidden_size, num_kv_heads, head_dim : int
        D, G and C.
    dtype : torch.dtype

    Raises
    ------
    ValueError, TypeError
        With the name of the tensor, what it is and what it should be.
    """
    _checks.layer_weights(weights, hidden_size, num_kv_heads, head_dim, dtype)


def early_exit_loss(
    hiddens: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    exit_weights: Tensor,
    eps: float = 1e-5,
    ignore_index: int = -100,
) -> EarlyExitLossOutput:
    """Σ weightₙ · mean cross-entropy of exit n (LayerSkip, arXiv 2404.16710, §4.1.2), logits never written in full.

    Every exit goes through the same norm and head. Differentiable in ``hiddens``, ``norm_weight``, ``head_weight`` and
    ``exit_weights``; a head that needs no gradient costs none.

    Parameters
    ----------
    hiddens : Tensor [N, R, D]
        State after each exit's layer, before the final norm. float64 is taken too.
    norm_weight : Tensor [D]
    head_weight : Tensor [V, D]
    labels : Tensor [R], int64
        The token that each row should predict, or ``ignore_index``; rows of no label do not enter the mean. The mean
        over no labels at all is 0.
    exit_weights : Tensor [N], fp32
    eps : float
    ignore_index : int
        Negative.

    Returns
    -------
    EarlyExitLossOutput
        In fp32.
    """
    # The states' gradients come along in the forward where that spares the backward a pass over the head; the CPU
    # profits always, since its backward can then take the head's gradient in one product for all rows.
    profits = hiddens.device.type == "cpu" or not head_weight.requires_grad
    with_slope = torch.is_grad_enabled() and hiddens.requires_grad and profits
    args = (hiddens, norm_weight, head_weight, labels, exit_weights, eps, ignore_index, with_slope)
    return EarlyExitLossOutput(*call("early_exit_loss", *args)[:2])
