"""linear and swiglu, plain and packed, and the three projections of attention as one launch.

Packed kernels read 32 columns of a group at a time. Groups begin at any even byte, so loads are bytes. Products are of
integers, exact in 16 bits; a block's sum is scaled in fp32, and the least value multiplies the block's sum of x, a
product with ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import BLOCK, Format, format_of, is_packed
from ._device import dot, inside, row_dot
from ._launch import (
    INTERPRETED,
    ROWS,
    Config,
    fetch_weights,
    launch_options,
    on,
    pick,
    splits,
    streaming_options,
    wait_for_inputs,
)

FINISH_BLOCK = 256
PACKED_BLOCK_N = 32  # weight rows of a tile


@triton.jit
def _store(
    total, bias_ptr, residual_ptr, out_ptr, row, col, ok, outputs, out_stride,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out = total + bias + residual, rounded once."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + col, mask=col < outputs, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row.to(tl.int64)[:, None] * outputs + col[None, :], mask=ok, other=0.0)
        total += residual.to(tl.float32)
    target = out_ptr + row.to(tl.int64)[:, None] * out_stride + col[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, rows, outputs, depth,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x weightᵀ + bias + residual of 16 rows × BLOCK_N outputs; with SPLITS the fp32 sum of one piece of the depth."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = row < rows, col < outputs
    ok = row_ok[:, None] & col_ok[None, :]
    if SPLITS == 1:
        fetch_weights(weight_ptr, col, col_ok, depth, BLOCK_N, PDL)
    wait_for_inputs(PDL)
    if SPLITS == 1:
        total = row_dot(
            x_ptr, weight_ptr, row, col, row_ok, col_ok, depth, 0, depth, ROWS, BLOCK_N, BLOCK_K, EVEN, INTERPRETED
        )
        _store(total, bias_ptr, residual_ptr, out_ptr, row, col, ok, outputs, outputs, HAS_BIAS, HAS_RESIDUAL)
    else:
        piece = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS) * BLOCK_K
        start = tl.program_id(2) * piece
        stop = tl.minimum(start + piece, depth)
        total = row_dot(
            x_ptr, weight_ptr, row, col, row_ok, col_ok, depth, start, stop, ROWS, BLOCK_N, BLOCK_K, EVEN, INTERPRETED
        )
        part_ptr = out_ptr + tl.program_id(2).to(tl.int64) * rows * outputs
        _store(total, bias_ptr, residual_ptr, part_ptr, row, col, ok, outputs, outputs, False, False)


@triton.jit(do_not_specialize=["rows"])
def linear_finish_kernel(
    parts_ptr, bias_ptr, residual_ptr, out_ptr, rows, outputs,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Σ over the pieces, in order, + bias + residual; one program a row and BLOCK outputs."""
    row = tl.program_id(0) + tl.arange(0, 1)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = (row < rows)[:, None] & (col < outputs)[None, :]
    wait_for_inputs(PDL)
    total = tl.zeros((1, BLOCK), tl.float32)
    for piece in tl.static_range(SPLITS):
        start = (piece * rows.to(tl.int64) + row.to(tl.int64)) * outputs
        total += tl.load(parts_ptr + start[:, None] + col[None, :], mask=ok, other=0.0)
    _store(total, bias_ptr, residual_ptr, out_ptr, row, col, ok, outputs, outputs, HAS_BIAS, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["rows"])
def qkv_kernel(
    x_ptr, q_ptr, k_ptr, v_ptr, q_bias_ptr, k_bias_ptr, v_bias_ptr, out_ptr, rows, queries, keys, depth,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [qᵀ kᵀ vᵀ] + bias, side by side in a row of the output; a program works on one of the three."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, query_tiles, key_tiles = tl.program_id(1), tl.cdiv(queries, BLOCK_N), tl.cdiv(keys, BLOCK_N)
    w_ptr, bias_ptr, outputs, base = q_ptr, q_bias_ptr, queries, 0
    if tile >= query_tiles + key_tiles:
        w_ptr, bias_ptr, outputs, base = v_ptr, v_bias_ptr, keys, queries + keys
        tile -= query_tiles + key_tiles
    elif tile >= query_tiles:
        w_ptr, bias_ptr, outputs, base = k_ptr, k_bias_ptr, keys, queries
        tile -= query_tiles
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = row < rows, col < outputs
    ok = row_ok[:, None] & col_ok[None, :]
    fetch_weights(w_ptr, col, col_ok, depth, BLOCK_N, PDL)
    wait_for_inputs(PDL)
    total = row_dot(x_ptr, w_ptr, row, col, row_ok, col_ok, depth, 0, depth, ROWS, BLOCK_N, BLOCK_K, EVEN, INTERPRETED)
    stride = queries + 2 * keys
    _store(total, bias_ptr, out_ptr, out_ptr + base, row, col, ok, outputs, stride, HAS_BIAS, False)


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, rows, features, depth,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a / (1 + exp(-a)) · b with a = x gateᵀ, b = x upᵀ, of 16 rows × BLOCK_N features."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row, w_row = row.to(tl.int64)[:, None] * depth, col.to(tl.int64)[:, None] * depth
    fetch_weights(gate_ptr, col, col < features, depth, BLOCK_N, PDL)
    fetch_weights(up_ptr, col, col < features, depth, BLOCK_N, PDL)
    wait_for_inputs(PDL)
    a, b = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
    for begin in range(0, depth, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + x_row + k, mask=inside(row < rows, k, depth, EVEN), other=0.0)
        w_ok = inside(col < features, k, depth, EVEN)
        gate = tl.load(gate_ptr + w_row + k, mask=w_ok, other=0.0)
        up = tl.load(up_ptr + w_row + k, mask=w_ok, other=0.0)
        a, b = dot(x, tl.trans(gate), a, INTERPRETED), dot(x, tl.trans(up), b, INTERPRETED)
    out = a / (1.0 + tl.exp(-a)) * b
    target = out_ptr + row.to(tl.int64)[:, None] * features + col[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (col < features)[None, :])


@triton.jit
def _half(ptr, ok):
    """Load fp16 from two bytes, as fp32."""
    low, high = tl.load(ptr, mask=ok, other=0), tl.load(ptr + 1, mask=ok, other=0)
    return (low.to(tl.uint16) | (high.to(tl.uint16) << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def packed_dot(
    x_ptr, w_ptr, row, col, row_ok, col_ok, depth, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr,
    BLOCKS: tl.constexpr, HAS_ZERO: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows of x [*, depth] times packed rows, whose groups are BLOCKS times 32 columns -> [ROWS, BLOCK_N] fp32."""
    header: tl.constexpr = 4 if HAS_ZERO else 2
    block_bytes: tl.constexpr = 4 * BITS
    group_bytes: tl.constexpr = header + BLOCKS * block_bytes
    groups = depth // (32 * BLOCKS)
    half, w_ok = tl.arange(0, 16)[None, :], col_ok[:, None]
    x_row, group_ptr = x_ptr + row.to(tl.int64)[:, None] * depth + half, w_ptr + col.to(tl.int64) * groups * group_bytes
    total, none = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
    for _ in range(groups):
        scale = _half(group_ptr, col_ok)
        for block in tl.static_range(BLOCKS):
            x = tl.load(x_row + block * 32, mask=row_ok[:, None], other=0.0)
            x_last = tl.load(x_row + block * 32 + 16, mask=row_ok[:, None], other=0.0)
            values = group_ptr[:, None] + header + block * block_bytes + half
            w = tl.load(values, mask=w_ok, other=0)
            if BITS == 4:
                w_last = (w >> 4).to(tl.int8) - (0 if HAS_ZERO else 8)
                w = (w & 15).to(tl.int8) - (0 if HAS_ZERO else 8)
            else:
                w_last = tl.load(values + 16, mask=w_ok, other=0).to(tl.int8, bitcast=True)
                w = w.to(tl.int8, bitcast=True)
            if not INTERPRETED:
                w, w_last = w.to(x.dtype), w_last.to(x.dtype)
            part = dot(x_last, tl.trans(w_last), dot(x, tl.trans(w), none, INTERPRETED), INTERPRETED)
            total += part * scale[None, :]
            if HAS_ZERO:
                ones = tl.full((16, BLOCK_N), 1.0, x.dtype)
                sums = dot(x_last, ones, dot(x, ones, none, INTERPRETED), INTERPRETED)
                total += sums * _half(group_ptr + 2, col_ok)[None, :]
        x_row += 32 * BLOCKS
        group_ptr += group_bytes
    return total


@triton.jit(do_not_specialize=["rows"])
def packed_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, rows, outputs, depth,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr,
    BLOCKS: tl.constexpr, HAS_ZERO: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x weightᵀ + bias + residual of 16 rows × BLOCK_N outputs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = row < rows, col < outputs
    ok, place = row_ok[:, None] & col_ok[None, :], row.to(tl.int64)[:, None] * outputs + col[None, :]
    wait_for_inputs(PDL)
    total = packed_dot(
        x_ptr, weight_ptr, row, col, row_ok, col_ok, depth, ROWS, BLOCK_N, BITS, BLOCKS, HAS_ZERO, INTERPRETED
    )
    if HAS_BIAS:
        total += tl.load(bias_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + place, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def packed_swiglu_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, rows, features, depth,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, HAS_ZERO: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a / (1 + exp(-a)) · b with a = x gateᵀ, b = x upᵀ, of 16 rows × BLOCK_N features."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = row < rows, col < features
    wait_for_inputs(PDL)
    a = packed_dot(x_ptr, gate_ptr, row, col, row_ok, col_ok, depth, ROWS, BLOCK_N, BITS, BLOCKS, HAS_ZERO, INTERPRETED)
    b = packed_dot(x_ptr, up_ptr, row, col, row_ok, col_ok, depth, ROWS, BLOCK_N, BITS, BLOCKS, HAS_ZERO, INTERPRETED)
    out = a / (1.0 + tl.exp(-a)) * b
    target = out_ptr + row.to(tl.int64)[:, None] * features + col[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


def _packed_options(x: Tensor, form: Format) -> dict[str, Any]:
    return {
        "ROWS": ROWS, "BLOCK_N": PACKED_BLOCK_N, "BITS": form.bits, "BLOCKS": form.group_size // BLOCK,
        "HAS_ZERO": form.has_zero, "INTERPRETED": INTERPRETED, "num_warps": 4, **launch_options(x),
    }  # fmt: skip


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    """Write `linear` to ``out`` [R, N]; all contiguous, not empty."""
    (rows, depth), outputs = x.shape, weight.shape[0]
    with on(x):
        packed_linear_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, PACKED_BLOCK_N))](
            x, weight, bias, residual, out, rows, outputs, depth, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, **_packed_options(x, format_of(weight, depth)),
        )  # fmt: skip
    return out


def packed_swiglu(x: Tensor, gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Write `swiglu` to ``out`` [R, F]; both weights in one format, all contiguous, not empty."""
    (rows, depth), features = x.shape, gate.shape[0]
    with on(x):
        packed_swiglu_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(features, PACKED_BLOCK_N))](
            x, gate, up, out, rows, features, depth, **_packed_options(x, format_of(gate, depth))
        )
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    (rows, depth), outputs, pieces = x.shape, weight.shape[0], splits(x.shape[1])
    out = x.new_empty(rows, outputs)
    if not out.numel():
        return out
    if is_packed(weight):
        return packed_linear(x, weight, bias, residual, out)
    first = out if pieces == 1 else x.new_empty(pieces, rows, outputs, dtype=torch.float32)
    has = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}

    def run(config: Config) -> None:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(outputs, config.block_n), pieces)
        linear_kernel[grid](
            x, weight, bias, residual, first, rows, outputs, depth, **has, SPLITS=pieces, **streaming_options(x, config)
        )

    with on(x):
        run(pick("linear", weight, rows, run))
        if pieces > 1:
            linear_finish_kernel[(rows, triton.cdiv(outputs, FINISH_BLOCK))](
                first, bias, residual, out, rows, outputs, **has, SPLITS=pieces, BLOCK=FINISH_BLOCK, **launch_options(x)
            )
    return out


def qkv(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, biases: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear` by q, k and v, bit for bit, in one launch if nothing is split or packed and all or no biases are given.

    ``x`` [R, D] is contiguous, ``q`` [H C, D], ``k``, ``v`` [G C, D]; returns [R, H C] and twice [R, G C], as views.
    """
    (rows, depth), queries, keys = x.shape, q.shape[0], k.shape[0]
    some = [bias is not None for bias in biases]
    if splits(depth) > 1 or any(some) != all(some) or any(is_packed(weight) for weight in (q, k, v)):
        return linear(x, q, biases[0]), linear(x, k, biases[1]), linear(x, v, biases[2])
    out = x.new_empty(rows, queries + 2 * keys)

    def run(config: Config) -> None:
        tiles = triton.cdiv(queries, config.block_n) + 2 * triton.cdiv(keys, config.block_n)
        qkv_kernel[(triton.cdiv(rows, ROWS), tiles)](
            x, q, k, v, *biases, out, rows, queries, keys, depth, HAS_BIAS=all(some), **streaming_options(x, config)
        )

    with on(x):
        run(pick("qkv", q, rows, run))
    return out[:, :queries], out[:, queries : queries + keys], out[:, queries + keys :]


def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    x = x.contiguous()
    (rows, depth), features = x.shape, gate.shape[0]
    out = x.new_empty(rows, features)
    if is_packed(gate):
        return packed_swiglu(x, gate, up, out) if out.numel() else out

    def run(config: Config) -> None:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(features, config.block_n))
        swiglu_kernel[grid](x, gate, up, out, rows, features, depth, **streaming_options(x, config))

    if out.numel():
        with on(x):
            run(pick("swiglu", gate, rows, run))
    return out
