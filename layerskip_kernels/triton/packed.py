"""linear and swiglu with packed weights, int8 and int4: one pass over the depth, a block of 32 columns at a time.

Groups begin at any even byte, so what is loaded are bytes. Products are of integers, which 16-bit numbers hold exactly;
a block's sum is scaled in fp32, and a least value is multiplied by the sum of x over the block, a product with ones.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are typed by their launch)
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..formats import BLOCK, Format, format_of
from ._launch import INTERPRETED, ROWS, launch_options, on, wait_for_inputs
from ._tiles import dot

BLOCK_N, NUM_WARPS = 32, 4


@triton.jit
def _half(ptr, ok):
    """The fp16 that begins at an even byte, in fp32."""
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


def _options(x: Tensor, form: Format) -> dict[str, Any]:
    return {
        "ROWS": ROWS, "BLOCK_N": BLOCK_N, "BITS": form.bits, "BLOCKS": form.group_size // BLOCK,
        "HAS_ZERO": form.has_zero, "INTERPRETED": INTERPRETED, "num_warps": NUM_WARPS, **launch_options(x),
    }  # fmt: skip


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    """`linear` into ``out`` [R, N]; all contiguous, not empty."""
    (rows, depth), outputs = x.shape, weight.shape[0]
    with on(x):
        packed_linear_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, BLOCK_N))](
            x, weight, bias, residual, out, rows, outputs, depth, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, **_options(x, format_of(weight, depth)),
        )  # fmt: skip
    return out


def packed_swiglu(x: Tensor, gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """`swiglu` into ``out`` [R, F]; both weights of one format, all contiguous, not empty."""
    (rows, depth), features = x.shape, gate.shape[0]
    with on(x):
        packed_swiglu_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(features, BLOCK_N))](
            x, gate, up, out, rows, features, depth, **_options(x, format_of(gate, depth))
        )
    return out
