"""Rotary embedding of q and k, and the write of k and v to the cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._device import inverse_rms
from ._launch import launch_options, on, power_of_two, wait_for_inputs
from .rms_norm import norm_block


@triton.jit
def slot_of(slots_ptr, sequence, HAS_SLOTS: tl.constexpr):
    """The row of the cache that a sequence uses."""
    row = sequence
    if HAS_SLOTS:
        row = tl.load(slots_ptr + sequence)
    return row


@triton.jit
def position_of(seq_lens_ptr, sequence, capacity):
    """The position of a sequence's first row, int64; far below 0 if its length is outside the cache."""
    length = tl.load(seq_lens_ptr + sequence)
    return tl.where((length >= 0) & (length <= capacity), length, -(1 << 40))


@triton.jit
def _rotate_row(
    x_ptr, norm_ptr, out_ptr, cos, sin, head_dim, eps,
    HAS_NORM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of one head, after its norm where there is one."""
    half = head_dim // 2
    column = tl.arange(0, HALF)
    ok = column < half
    a = tl.load(x_ptr + column, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + half + column, mask=ok, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if HAS_NORM:
        inverse = inverse_rms(x_ptr, head_dim, eps, BLOCK, STEPS, UNROLL)
        weight_a = tl.load(norm_ptr + column, mask=ok, other=0.0).to(tl.float32)
        weight_b = tl.load(norm_ptr + half + column, mask=ok, other=0.0).to(tl.float32)
        a = (a * inverse * weight_a).to(dtype).to(tl.float32)
        b = (b * inverse * weight_b).to(dtype).to(tl.float32)
    # fma by name: with and without a norm the compiler must contract the same way
    tl.store(out_ptr + column, tl.fma(a, cos, -(b * sin)).to(dtype), mask=ok)
    tl.store(out_ptr + half + column, tl.fma(b, cos, a * sin).to(dtype), mask=ok)


@triton.jit(do_not_specialize=["rows", "num_slots", "q_stride", "k_stride", "v_stride"])
def rope_kv_append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, seq_lens_ptr, slots_ptr, out_ptr, q_norm_ptr,
    k_norm_ptr, rows, num_slots, num_heads, num_kv_heads, head_dim, capacity, q_stride, k_stride, v_stride, eps,
    HAS_SLOTS: tl.constexpr, HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row and head: H query heads, then G keys, then G values; position = length + m."""
    wait_for_inputs(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = row // rows
    position = position_of(seq_lens_ptr, sequence, capacity) + row % rows
    slot = slot_of(slots_ptr, sequence, HAS_SLOTS)
    inside = (position >= 0) & (position < capacity) & (slot >= 0) & (slot < num_slots)
    lane = tl.arange(0, HALF)
    at = position + tl.zeros((HALF,), tl.int64)
    ok = (lane < head_dim // 2) & (at >= 0) & (at < capacity)
    cos = tl.load(cos_ptr + at * (head_dim // 2) + lane, mask=ok, other=float("nan"))
    sin = tl.load(sin_ptr + at * (head_dim // 2) + lane, mask=ok, other=float("nan"))
    if head < num_heads:
        target = out_ptr + (row * num_heads + head) * head_dim
        _rotate_row(
            q_ptr + row * q_stride + head * head_dim, q_norm_ptr, target, cos, sin, head_dim, eps, HAS_Q_NORM, HALF,
            BLOCK, STEPS, UNROLL
        )  # fmt: skip
    elif inside:
        kv_head = (head - num_heads) % num_kv_heads
        place = ((slot * num_kv_heads + kv_head) * capacity + position) * head_dim
        if head < num_heads + num_kv_heads:
            source = k_ptr + row * k_stride + kv_head * head_dim
            target = k_cache_ptr + place
            _rotate_row(source, k_norm_ptr, target, cos, sin, head_dim, eps, HAS_K_NORM, HALF, BLOCK, STEPS, UNROLL)
        else:
            column = tl.arange(0, BLOCK)
            value = tl.load(v_ptr + row * v_stride + kv_head * head_dim + column, mask=column < head_dim)
            tl.store(v_cache_ptr + place + column, value, mask=column < head_dim)


def _rows_of(x: Tensor) -> Tensor:
    """[B, M, heads, C] with contiguous heads and evenly spaced rows; copied if needed."""
    batch, rows, _, head_dim = x.shape
    even = x.stride()[2:] == (head_dim, 1) and (batch == 1 or x.stride(0) == rows * x.stride(1))
    return x if even else x.contiguous()


def rope_kv_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor,
    slots: Tensor | None = None, norms: tuple[Tensor | None, Tensor | None] = (None, None), eps: float = 0.0
) -> Tensor:  # fmt: skip
    """``norms`` [C] of q and k are applied first, as by `rms_norm`."""
    q, k, v = _rows_of(q), _rows_of(k), _rows_of(v)
    (batch, rows, num_heads, head_dim), (num_slots, num_kv_heads, capacity) = q.shape, k_cache.shape[:3]
    _checks.positions(seq_lens, rows, capacity)
    _checks.distinct_slots(slots, num_slots)
    out = q.new_empty(q.shape)
    if batch * rows * (num_heads + num_kv_heads):
        with on(q):
            rope_kv_append_kernel[(batch * rows, num_heads + 2 * num_kv_heads)](
                q, k, v, cos, sin, k_cache, v_cache, seq_lens, slots, out, *norms, rows, num_slots, num_heads,
                num_kv_heads, head_dim, capacity, q.stride(1), k.stride(1), v.stride(1), eps,
                HAS_SLOTS=slots is not None, HAS_Q_NORM=norms[0] is not None, HAS_K_NORM=norms[1] is not None,
                HALF=power_of_two(head_dim // 2), **norm_block(head_dim), **launch_options(q), num_warps=1,
            )  # fmt: skip
    return out
