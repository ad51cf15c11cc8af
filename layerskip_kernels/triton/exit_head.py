"""The head is streamed once; each tile of logits gives its maximum, that maximum's row, and a sum of exponentials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._device import DRAW, divisor_of, gumbel, row_dot
from ._launch import ROWS, Config, block_k, fetch_weights, launch_options, on, pick, streaming_options, wait_for_inputs
from .rms_norm import rms_norm

NO_ROW = tl.constexpr(2147483647)
FINISH_BLOCK = 1024  # tiles per step of the second stage
# By default ptxas aims at 64 registers for 16-bit products, two too few when logits are written, though shared memory
# is what limits occupancy.
MORE_REGISTERS = {} if torch.version.hip else {"maxnreg": 96}


@triton.jit
def _finite(x):
    """x, or 0 if it is infinite: the base of exponentials."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit(do_not_specialize=["rows"])
def exit_head_kernel(
    x_ptr, head_ptr, scale_ptr, map_ptr, temperature_ptr, seed_ptr, offset_ptr, logits_ptr, best_ptr, index_ptr,
    sum_ptr, peak_ptr, value_ptr, rows, vocab_size, hidden_size, logits_stride,
    HAS_SCALE: tl.constexpr, HAS_MAP: tl.constexpr, SAMPLES: tl.constexpr, HAS_LOGITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """max s, the lowest argmax, and Σ exp(z - max z) of z = scale · x headᵀ / T, for 16 rows × BLOCK_N head rows.

    s is z, plus noise with SAMPLES in rows whose temperature is not 0; then max z and the chosen z are written, too.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = row < rows, col < vocab_size
    fetch_weights(head_ptr, col, col_ok, hidden_size, BLOCK_N, PDL)
    wait_for_inputs(PDL)
    logits = row_dot(
        x_ptr, head_ptr, row, col, row_ok, col_ok, hidden_size, 0, hidden_size, ROWS, BLOCK_N, BLOCK_K, EVEN,
        INTERPRETED
    )  # fmt: skip
    if HAS_SCALE:
        logits *= tl.load(scale_ptr + col, mask=col_ok, other=0.0)[None, :]
    logits = tl.where(col_ok[None, :], logits, float("-inf"))
    if HAS_LOGITS:
        place = logits_ptr + row.to(tl.int64)[:, None] * logits_stride + col[None, :]
        tl.store(place, logits, mask=row_ok[:, None] & col_ok[None, :])
    scores = logits
    if SAMPLES:
        token = col
        if HAS_MAP:
            token = tl.load(map_ptr + col, mask=col_ok, other=0)
        logits, scores = _draw(logits, token, temperature_ptr, seed_ptr, offset_ptr, row, row_ok)
    best = tl.max(scores, axis=1)
    index = tl.min(tl.where(scores == best[:, None], col[None, :], NO_ROW), axis=1)
    peak = tl.max(logits, axis=1)
    target = row.to(tl.int64) * tiles + tile
    tl.store(best_ptr + target, best, mask=row_ok)
    tl.store(index_ptr + target, index, mask=row_ok)
    tl.store(sum_ptr + target, tl.sum(tl.exp(logits - _finite(peak)[:, None]), axis=1), mask=row_ok)
    if SAMPLES:
        value = tl.sum(tl.where(index[:, None] == col[None, :], logits, 0.0), axis=1)
        tl.store(peak_ptr + target, peak, mask=row_ok)
        tl.store(value_ptr + target, value, mask=row_ok)


@triton.jit
def _draw(logits, token, temperature_ptr, seed_ptr, offset_ptr, row, row_ok):
    """Logits [ROWS, BLOCK_N] divided by the row's temperature, and the same plus noise where it is not 0."""
    temperature = tl.load(temperature_ptr + row, mask=row_ok, other=0.0)[:, None]
    seed = tl.load(seed_ptr + row, mask=row_ok, other=0)[:, None]
    offset = tl.load(offset_ptr + row, mask=row_ok, other=0)[:, None]
    logits = tl.div_rn(logits, divisor_of(temperature))
    return logits, tl.where(temperature > 0, logits + gumbel(seed, offset, token[None, :], DRAW), logits)


@triton.jit
def exit_head_finish_kernel(
    best_ptr, index_ptr, sum_ptr, peak_ptr, value_ptr, map_ptr, token_ptr, logit_ptr, lse_ptr, tiles, vocab_size,
    HAS_MAP: tl.constexpr, SAMPLES: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: M = max m, Σ s exp(m - M) over the tiles; the token is -1 where the sum is not finite."""
    wait_for_inputs(PDL)
    start_of_row = tl.program_id(0).to(tl.int64) * tiles
    bests = tl.full((BLOCK,), float("-inf"), tl.float32)
    peaks = bests
    for start in range(0, tiles, BLOCK):
        tile, ok = start_of_row + start + tl.arange(0, BLOCK), start + tl.arange(0, BLOCK) < tiles
        bests = tl.maximum(bests, tl.load(best_ptr + tile, mask=ok, other=float("-inf")))
        peaks = tl.maximum(peaks, tl.load(peak_ptr + tile, mask=ok, other=float("-inf")))
    best, peak = tl.max(bests, axis=0), tl.max(peaks, axis=0)
    sums = tl.zeros((BLOCK,), tl.float32)
    lowest = tl.full((BLOCK,), NO_ROW, tl.int32)
    for start in range(0, tiles, BLOCK):
        tile, ok = start_of_row + start + tl.arange(0, BLOCK), start + tl.arange(0, BLOCK) < tiles
        here = tl.load(peak_ptr + tile, mask=ok, other=float("-inf"))
        part = tl.load(sum_ptr + tile, mask=ok, other=0.0)
        sums += part * tl.exp(here - _finite(peak))
        index = tl.load(index_ptr + tile, mask=ok, other=NO_ROW)
        score = tl.load(best_ptr + tile, mask=ok, other=float("-inf"))
        lowest = tl.minimum(lowest, tl.where(score == best, index, NO_ROW))
    lse = _finite(peak) + tl.log(tl.sum(sums, axis=0))
    index = tl.min(lowest, axis=0)
    token, logit = index.to(tl.int64), best
    if HAS_MAP:
        token = tl.load(map_ptr + index, mask=index < vocab_size, other=-1)
    if SAMPLES:
        logit = tl.load(value_ptr + start_of_row + index // HEIGHT, mask=index < vocab_size, other=float("nan"))
    finite = tl.abs(lse) < float("inf")  # false of NaN, too
    row = tl.program_id(0)
    tl.store(token_ptr + row, tl.where(finite, token, -1))
    tl.store(logit_ptr + row, tl.where(lse == lse, logit, lse))
    tl.store(lse_ptr + row, lse)


def exit_head(
    hidden: Tensor, norm_weight: Tensor, head_weight: Tensor, eps: float, token_map: Tensor | None = None,
    scale: Tensor | None = None, temperature: Tensor | None = None, seed: Tensor | None = None,
    offset: Tensor | None = None, logits: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """On a GPU a negative temperature counts as 0."""
    _checks.temperatures(temperature)
    rows, (vocab_size, hidden_size) = hidden.shape[0], head_weight.shape
    token = hidden.new_empty(rows, dtype=torch.int64)
    logit, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if not rows:
        return token, logit, lse
    x, samples = rms_norm(hidden, norm_weight, eps), temperature is not None
    draw = (temperature, seed, offset, logits)
    stride = 0 if logits is None else logits.stride(0)
    # Partial tiles need registers for masks, and get them anyway.
    pipelined = hidden_size % block_k(x.element_size()) == 0
    options = MORE_REGISTERS if logits is not None and pipelined and x.element_size() == 2 else {}

    def run(config: Config) -> list[Tensor]:
        tiles = triton.cdiv(vocab_size, config.block_n)
        kinds = (torch.float32, torch.int32, torch.float32, *((torch.float32,) * 2 if samples else ()))
        parts = [x.new_empty(rows, tiles, dtype=kind) for kind in kinds]  # best, index, sum (, peak, value)
        parts += parts[:1] * (5 - len(parts))  # without noise the best is the peak
        exit_head_kernel[(triton.cdiv(rows, ROWS), tiles)](
            x, head_weight, scale, token_map, *draw, *parts, rows, vocab_size, hidden_size, stride,
            HAS_SCALE=scale is not None, HAS_MAP=token_map is not None, SAMPLES=samples,
            HAS_LOGITS=logits is not None, **streaming_options(x, config), **options,
        )  # fmt: skip
        return parts

    with on(x):
        config = pick("exit_head", head_weight, rows, run)
        parts = run(config)
        exit_head_finish_kernel[(rows,)](
            *parts, token_map, token, logit, lse, parts[0].shape[1], vocab_size, HAS_MAP=token_map is not None,
            SAMPLES=samples, HEIGHT=config.block_n, BLOCK=FINISH_BLOCK, **launch_options(x), num_warps=4,
        )  # fmt: skip
    return token, logit, lse
