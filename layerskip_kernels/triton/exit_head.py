"""exit_head: the head is streamed once; a tile of logits leaves its maximum, its row, and a sum of exponentials."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are typed by their launch)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import Config, pick, streaming_options
from ._launch import ROWS, launch_options, on, wait_for_inputs
from ._tiles import row_dot
from .norm import rms_norm

NO_ROW = tl.constexpr(2147483647)
FINISH_BLOCK = 1024  # tiles that the second stage takes at a time


@triton.jit
def _finite(x):
    """x, with 0 in the place of an infinity: what exponentials are taken relative to."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit(do_not_specialize=["rows"])
def exit_head_kernel(
    x_ptr, head_ptr, scale_ptr, peak_ptr, index_ptr, sum_ptr, rows, vocabulary, depth,
    HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """m = max z, the lowest argmax, and Σ exp(z - m) of z = scale · x headᵀ, for 16 rows × BLOCK_N head rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(PDL)
    row_ok, col_ok = row < rows, col < vocabulary
    logits = row_dot(
        x_ptr, head_ptr, row, col, row_ok, col_ok, depth, 0, depth, ROWS, BLOCK_N, BLOCK_K, EVEN, INTERPRETED
    )
    if HAS_SCALE:
        logits *= tl.load(scale_ptr + col, mask=col_ok, other=0.0)[None, :]
    logits = tl.where(col_ok[None, :], logits, float("-inf"))
    peak = tl.max(logits, axis=1)
    index = tl.min(tl.where(logits == peak[:, None], col[None, :], NO_ROW), axis=1)
    total = tl.sum(tl.exp(logits - _finite(peak)[:, None]), axis=1)
    target = row.to(tl.int64) * tiles + tile
    tl.store(peak_ptr + target, peak, mask=row_ok)
    tl.store(index_ptr + target, index, mask=row_ok)
    tl.store(sum_ptr + target, total, mask=row_ok)


@triton.jit
def exit_head_finish_kernel(
    peak_ptr, index_ptr, sum_ptr, map_ptr, token_ptr, logit_ptr, lse_ptr, tiles, vocabulary,
    HAS_MAP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: M = max m, Σ s exp(m - M) over the tiles; the token is -1 where the sum is not finite."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        here = tl.load(peak_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
        peaks = tl.maximum(peaks, here)
    peak = tl.max(peaks, axis=0)
    sums = tl.zeros((BLOCK,), tl.float32)
    lowest = tl.full((BLOCK,), NO_ROW, tl.int32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        here = tl.load(peak_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
        index = tl.load(index_ptr + row * tiles + tile, mask=tile < tiles, other=NO_ROW)
        part = tl.load(sum_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)
        sums += part * tl.exp(here - _finite(peak))
        lowest = tl.minimum(lowest, tl.where(here == peak, index, NO_ROW))
    lse = _finite(peak) + tl.log(tl.sum(sums, axis=0))
    index = tl.min(lowest, axis=0)
    token = index.to(tl.int64)
    if HAS_MAP:
        token = tl.load(map_ptr + index, mask=index < vocabulary, other=-1)
    finite = tl.abs(lse) < float("inf")  # false of NaN, too
    tl.store(token_ptr + row, tl.where(finite, token, -1))
    tl.store(logit_ptr + row, tl.where(lse == lse, peak, lse))
    tl.store(lse_ptr + row, lse)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `layerskip_kernels.exit_head`."""
    rows, (vocabulary, depth) = hidden.shape[0], head_weight.shape
    token = hidden.new_empty(rows, dtype=torch.int64)
    logit, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if not rows:
        return token, logit, lse
    x = rms_norm(hidden, norm_weight, eps)

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        tiles = triton.cdiv(vocabulary, config.block_n)
        peak, total = (x.new_empty(rows, tiles, dtype=torch.float32) for _ in range(2))
        index = x.new_empty(rows, tiles, dtype=torch.int32)
        exit_head_kernel[(triton.cdiv(rows, ROWS), tiles)](
            x, head_weight, scale, peak, index, total, rows, vocabulary, depth, HAS_SCALE=scale is not None,
            **streaming_options(x, config),
        )  # fmt: skip
        return peak, index, total

    with on(x):
        peak, index, total = run(pick("exit_head", head_weight, run))
        exit_head_finish_kernel[(rows,)](
            peak, index, total, token_map, token, logit, lse, peak.shape[1], vocabulary,
            HAS_MAP=token_map is not None, BLOCK=FINISH_BLOCK, **launch_options(x), num_warps=4,
        )  # fmt: skip
    return token, logit, lse
