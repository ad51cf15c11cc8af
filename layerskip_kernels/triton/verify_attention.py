"""Attention of new rows over the cache, split over positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._device import dot
from ._launch import INTERPRETED, ROWS, launch_options, on, power_of_two, wait_for_inputs
from .rope_kv_append import position_of, slot_of

SPLIT = 128  # positions per program; fixed, so that the order of additions does not depend on the lengths
ROWS_AT_ONCE = 64  # rows of a sequence per launch: bounds the partial results of a long prompt
MIN_SCRATCH = 64 << 20  # bytes that the partial results may take with any cache


@triton.jit
def _attend(
    total, mass, peak, q, k_ptr, v_ptr, position, first, last, head_dim, scale,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, COMMON: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the positions [first, last) -> Σ p v, Σ p, max score; later positions are not loaded.

    COMMON: every row sees all of them. Otherwise a value that is not finite may be hidden from a row, and 0 · inf is
    NaN: it is replaced by 0, and the rows that see it become NaN.
    """
    column = tl.arange(0, BLOCK_C)[None, :]
    for begin in range(first, last, BLOCK_T):
        at = begin + tl.arange(0, BLOCK_T)
        ok = (at < last)[:, None] & (column < head_dim)
        cell = at.to(tl.int64)[:, None] * head_dim + column
        k = tl.load(k_ptr + cell, mask=ok, other=0.0)
        v = tl.load(v_ptr + cell, mask=ok, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((ROWS, BLOCK_T), tl.float32), INTERPRETED) * scale
        seen = at[None, :] <= position[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees nothing here: exp(-inf - 0) = 0
        weight = tl.exp(scores - base[:, None])
        kept = tl.exp(peak - base)
        mass = mass * kept + tl.sum(weight, axis=1)
        if not COMMON:
            wide = v.to(tl.float32)
            broken = wide - wide != 0.0
            seen, marks = seen.to(tl.float32).to(v.dtype), broken.to(tl.float32).to(v.dtype)
            touched = dot(seen, marks, tl.zeros((ROWS, BLOCK_C), tl.float32), INTERPRETED)
            total = tl.where(touched > 0, float("nan"), total)
            v = tl.where(broken, 0.0, wide).to(v.dtype)
        total = dot(weight.to(v.dtype), v, total * kept[:, None], INTERPRETED)
        peak = higher
    return total, mass, peak


@triton.jit(do_not_specialize=["rows", "num_slots", "skipped", "all_rows"])
def verify_attention_kernel(
    q_ptr, k_ptr, v_ptr, seq_lens_ptr, slots_ptr, total_ptr, mass_ptr, peak_ptr,
    rows, num_slots, skipped, all_rows, num_kv_heads, head_dim, capacity, scale,
    HAS_SLOTS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per SPLIT positions, key/value head of a sequence, and 16 of its (row, query head) pairs."""
    piece, pieces = tl.program_id(0), tl.num_programs(0)
    sequence, kv_head = (tl.program_id(1) // num_kv_heads).to(tl.int64), tl.program_id(1) % num_kv_heads
    pair = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    m, head, ok = pair // SHARED, kv_head * SHARED + pair % SHARED, pair < rows * SHARED
    wait_for_inputs(PDL)
    position = position_of(seq_lens_ptr, sequence, capacity) + skipped + m
    position = tl.minimum(tl.maximum(position, -1), capacity).to(tl.int32)
    last = tl.minimum(tl.max(tl.where(ok, position, -1), axis=0) + 1, capacity)
    slot = slot_of(slots_ptr, sequence, HAS_SLOTS)
    last = tl.where((slot >= 0) & (slot < num_slots), last, 0)
    first = piece * SPLIT
    if first < last:
        last = tl.minimum(last, first + SPLIT)
        column = tl.arange(0, BLOCK_C)[None, :]
        place = (sequence * all_rows + skipped + m) * (num_kv_heads * SHARED) + head
        q_mask = ok[:, None] & (column < head_dim)
        q = tl.load(q_ptr + place[:, None] * head_dim + column, mask=q_mask, other=0.0)
        plane = (slot * num_kv_heads + kv_head) * capacity * head_dim
        total = tl.zeros((ROWS, BLOCK_C), tl.float32)
        mass, peak = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32)
        shortest = tl.min(tl.where(ok, position, last - 1), axis=0) + 1  # positions that every row sees
        common = first + tl.maximum(tl.minimum(shortest, last) - first, 0) // BLOCK_T * BLOCK_T
        total, mass, peak = _attend(
            total, mass, peak, q, k_ptr + plane, v_ptr + plane, position, first, common, head_dim, scale,
            ROWS, BLOCK_T, BLOCK_C, True, INTERPRETED,
        )  # fmt: skip
        total, mass, peak = _attend(
            total, mass, peak, q, k_ptr + plane, v_ptr + plane, position, common, last, head_dim, scale,
            ROWS, BLOCK_T, BLOCK_C, False, INTERPRETED,
        )  # fmt: skip
        part = ((sequence * rows + m) * (num_kv_heads * SHARED) + head) * pieces + piece
        tl.store(total_ptr + part[:, None] * head_dim + column, total, mask=q_mask)
        tl.store(mass_ptr + part, mass, mask=ok)
        tl.store(peak_ptr + part, peak, mask=ok)


@triton.jit(do_not_specialize=["rows", "num_slots", "skipped", "all_rows"])
def verify_attention_finish_kernel(
    total_ptr, mass_ptr, peak_ptr, seq_lens_ptr, slots_ptr, out_ptr, rows, num_slots, skipped, all_rows, num_heads,
    head_dim, capacity, pieces, HAS_SLOTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join the pieces of one row and head, in order; a position or slot outside the cache gives NaN."""
    wait_for_inputs(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    sequence, m = (row // rows).to(tl.int64), row % rows
    position = position_of(seq_lens_ptr, sequence, capacity) + skipped + m
    part = ((sequence * rows + m) * num_heads + head) * pieces
    column = tl.arange(0, BLOCK_C)
    peak, mass = float("-inf"), 0.0
    total = tl.zeros((BLOCK_C,), tl.float32)
    slot = slot_of(slots_ptr, sequence, HAS_SLOTS)
    inside = (position >= 0) & (position < capacity) & (slot >= 0) & (slot < num_slots)
    for piece in range(0, tl.where(inside, position // SPLIT + 1, 0)):
        here = tl.load(peak_ptr + part + piece)
        higher = tl.maximum(peak, here)
        kept, added = tl.exp(peak - higher), tl.exp(here - higher)
        mass = tl.fma(mass, kept, tl.load(mass_ptr + part + piece) * added)
        value = tl.load(total_ptr + (part + piece) * head_dim + column, mask=column < head_dim, other=0.0)
        total = tl.fma(total, kept, value * added)
        peak = higher
    place = (sequence * all_rows + skipped + m) * num_heads + head
    tl.store(out_ptr + place * head_dim + column, (total / mass).to(out_ptr.dtype.element_ty), mask=column < head_dim)


def attention_tile(head_dim: int, itemsize: int) -> dict[str, int]:
    """Positions of a tile and pipeline stages, so that the buffers of K and V stay within 64 KiB.

    A head size that is no multiple of 16 is copied through registers, and takes smaller tiles.
    """
    block_c = power_of_two(head_dim, 16)
    block_t = max(16, min(64 if head_dim % 16 == 0 else 32, 8192 // (block_c * itemsize)))
    return {"BLOCK_C": block_c, "BLOCK_T": block_t, "num_stages": 3, "num_warps": 4}


def rows_at_once(batch: int, num_heads: int, pieces: int, head_dim: int, cache_bytes: int) -> int:
    """Rows of a sequence in one launch, so that partial results take at most half of a layer's cache, or 64 MiB."""
    row_bytes = batch * num_heads * pieces * (head_dim + 2) * 4
    return max(1, min(ROWS_AT_ONCE, max(MIN_SCRATCH, cache_bytes // 2) // max(1, row_bytes)))


def verify_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, slots: Tensor | None = None
) -> Tensor:
    q, has_slots = q.contiguous(), slots is not None
    (batch, all_rows, num_heads, head_dim), (num_slots, num_kv_heads, capacity) = q.shape, k_cache.shape[:3]
    _checks.positions(seq_lens, all_rows, capacity)
    _checks.distinct_slots(slots, num_slots)
    out = torch.empty_like(q)
    pieces, tile = triton.cdiv(capacity, SPLIT), attention_tile(head_dim, q.element_size())
    max_rows = rows_at_once(batch, num_heads, pieces, head_dim, k_cache.nbytes + v_cache.nbytes)
    for skipped in range(0, all_rows if out.numel() else 0, max_rows):
        rows = min(max_rows, all_rows - skipped)
        total = q.new_empty(batch * rows * num_heads * pieces, head_dim, dtype=torch.float32)
        mass, peak = total.new_empty(total.shape[0]), total.new_empty(total.shape[0])
        with on(q):
            grid = (pieces, batch * num_kv_heads, triton.cdiv(rows * (num_heads // num_kv_heads), ROWS))
            verify_attention_kernel[grid](
                q, k_cache, v_cache, seq_lens, slots, total, mass, peak, rows, num_slots, skipped, all_rows,
                num_kv_heads, head_dim, capacity, head_dim**-0.5, HAS_SLOTS=has_slots, SHARED=num_heads // num_kv_heads,
                ROWS=ROWS, SPLIT=SPLIT, INTERPRETED=INTERPRETED, **tile, **launch_options(q),
            )  # fmt: skip
            verify_attention_finish_kernel[(batch * rows, num_heads)](
                total, mass, peak, seq_lens, slots, out, rows, num_slots, skipped, all_rows, num_heads, head_dim,
                capacity, pieces, HAS_SLOTS=has_slots, SPLIT=SPLIT, BLOCK_C=tile["BLOCK_C"], **launch_options(q),
                num_warps=1,
            )  # fmt: skip
    return out
