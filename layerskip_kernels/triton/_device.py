"""Device functions that kernels share: sums whose order the compiler does not choose, and the noise of sampling."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _noise

DRAW, ACCEPT, RESIDUAL = (tl.constexpr(stream) for stream in (_noise.DRAW, _noise.ACCEPT, _noise.RESIDUAL))
_SMALL, _LEAST = tl.constexpr(2.0**-10), tl.constexpr(2.0**-24)


@triton.jit
def halve(x, WIDTH: tl.constexpr):
    """Sums of neighbours, [1, WIDTH] -> [1, WIDTH / 2]."""
    even, odd = tl.split(tl.reshape(x, (1, WIDTH // 2, 2)))
    return even + odd


@triton.jit
def tree_sum(x, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """Sum of [1, WIDTH], 2^STEPS = WIDTH, as a tree of elementwise additions: the same bits in every kernel."""
    for step in tl.static_range(STEPS):
        x = halve(x, WIDTH >> step)
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def inverse_rms(x_ptr, width, eps, BLOCK: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of the row at ``x_ptr``, in fp32; UNROLL loads are in flight at a time."""
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, width, BLOCK * UNROLL):
        for piece in tl.static_range(UNROLL):
            column = start + piece * BLOCK + tl.arange(0, BLOCK)[None, :]
            x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
            squares = tl.fma(x, x, squares)
    return tl.rsqrt(tree_sum(squares, BLOCK, STEPS) / width + eps)


@triton.jit
def inside(row_ok, k, stop, EVEN: tl.constexpr):
    """Mask of a tile. With EVEN, whole tiles fill the depth: columns need no mask, which saves registers."""
    mask = row_ok[:, None]
    if not EVEN:
        mask = mask & (k < stop)
    return mask


@triton.jit
def row_dot(
    x_ptr, w_ptr, row, col, row_ok, col_ok, depth, start, stop,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows of x [*, depth] times rows of w [*, depth], over the columns [start, stop) -> [ROWS, BLOCK_N] fp32."""
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    x_row, w_row = x_ptr + row.to(tl.int64)[:, None] * depth, w_ptr + col.to(tl.int64)[:, None] * depth
    for begin in range(start, stop, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_row + k, mask=inside(row_ok, k, stop, EVEN), other=0.0)
        w = tl.load(w_row + k, mask=inside(col_ok, k, stop, EVEN), other=0)
        if not INTERPRETED:
            w = w.to(x.dtype)  # of an int8 head; exact in every dtype
        total = dot(x, tl.trans(w), total, INTERPRETED)
    return total


@triton.jit
def dot(a, b, total, INTERPRETED: tl.constexpr):
    """a b + total with fp32 sums.

    Triton's interpreter multiplies bf16 wrongly, and the order of its fp32 sums depends on the row's place in the tile,
    unlike on a GPU: there the sum is written out.
    """
    if INTERPRETED:
        return total + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def uniform(seed, offset, token, STREAM: tl.constexpr):
    """(word + 1/2) 2^-32 in fp32, in (0, 1]; int64 ``seed`` and ``offset`` and int32 or int64 ``token`` broadcast."""
    low, high = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, token.to(tl.uint32), low, high, STREAM)
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(seed, offset, token, STREAM: tl.constexpr):
    """-log E, E = -log(1 - u)."""
    u = uniform(seed, offset, token, STREAM)
    return -tl.log(tl.where(u < _SMALL, u + u * u / 2, -tl.log(tl.maximum(1.0 - u, _LEAST))))


@triton.jit
def divisor_of(temperature):
    """The divisor of logits: the temperature, or 1 for a greedy row."""
    return tl.where(temperature > 0, temperature, 1.0)
