"""Speculative rejection sampling: log-sum-exps, then Gumbel-max over vocabulary tiles for the next token.

Three launches, so that a program reads at most a tile or a row of logits. Each program that needs the number of
accepted draft tokens computes it again: that takes a few loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._device import ACCEPT, RESIDUAL, divisor_of, gumbel, uniform
from ._launch import launch_options, on, power_of_two, wait_for_inputs
from .accept_greedy import advance

NO_TOKEN = tl.constexpr(2147483647)
ROW_BLOCK, TILE, FINISH_BLOCK = 4096, 1024, 1024  # tokens of a step of one row, of a tile; tiles of a step


@triton.jit
def row_statistics_kernel(
    logits_ptr, temperature_ptr, lse_ptr, best_ptr, rows, vocab_size, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """log Σ exp(z / T) of one of a sequence's ``rows``, and the lowest argmax of z."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    divisor = divisor_of(tl.load(temperature_ptr + row // rows))
    lane = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    places = tl.full((BLOCK,), NO_TOKEN, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        col = start + lane
        z = tl.load(logits_ptr + row * vocab_size + col, mask=col < vocab_size, other=float("-inf"))
        places = tl.where(z > peaks, col, places)
        peaks = tl.maximum(peaks, z)
    peak = tl.max(peaks, axis=0)
    best = tl.min(tl.where(peaks == peak, places, NO_TOKEN), axis=0)
    base = tl.div_rn(tl.where(tl.abs(peak) == float("inf"), 0.0, peak), divisor)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        col = start + lane
        z = tl.load(logits_ptr + row * vocab_size + col, mask=col < vocab_size, other=float("-inf"))
        mass += tl.exp(tl.div_rn(z, divisor) - base)
    tl.store(lse_ptr + row, base + tl.log(tl.sum(mass, axis=0)))
    tl.store(best_ptr + row, best)


@triton.jit
def _decide(
    draft_ptr, q_ptr, p_ptr, inverse_ptr, q_lse_ptr, p_lse_ptr, best_ptr, sequence, length, temperature, seed,
    num_speculations, draft_vocab_size, vocab_size, HAS_MAP: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The number of accepted draft tokens, whether the next one was rejected, whether the row after them is finite."""
    k = tl.arange(0, ENTRIES)
    ok = k < num_speculations
    p_row, q_row = sequence * (num_speculations + 1) + k, sequence * num_speculations + k
    token = tl.load(draft_ptr + q_row, mask=ok, other=-1)
    real = ok & (token >= 0) & (token < vocab_size)
    column = token
    if HAS_MAP:
        column = tl.load(inverse_ptr + token, mask=real, other=-1).to(tl.int64)
    own = real & (column >= 0)
    divisor = divisor_of(temperature)
    p = tl.load(p_ptr + p_row * vocab_size + token, mask=real, other=float("-inf"))
    q = tl.load(q_ptr + q_row * draft_vocab_size + column, mask=own, other=float("-inf"))
    p_lse = tl.load(p_lse_ptr + p_row, mask=k <= num_speculations, other=float("nan"))
    q_lse = tl.load(q_lse_ptr + q_row, mask=ok, other=0.0)
    log_ratio = (tl.div_rn(p, divisor) - p_lse) - (tl.div_rn(q, divisor) - q_lse)
    log_u = tl.log(uniform(seed, length + k, k * 0, ACCEPT))
    best = tl.load(best_ptr + p_row, mask=ok, other=-1)
    sampled = tl.where(temperature > 0, token, -1)  # greedy rows, and rows without a draft token, do not use q
    finite = (tl.abs(p_lse) < float("inf")) & ((tl.abs(q_lse) < float("inf")) | (sampled < 0))
    agrees = tl.where(temperature > 0, log_u < log_ratio, token == best) & real & finite
    accepted = tl.min(tl.where(agrees, ENTRIES, tl.minimum(k, num_speculations)), axis=0)
    rejected = tl.max(tl.where((k == accepted) & ok & (token >= 0), 1, 0), axis=0)
    return accepted, rejected, tl.max(tl.where((k == accepted) & finite, 1, 0), axis=0)


@triton.jit(do_not_specialize=["num_speculations"])
def accept_sampled_kernel(
    draft_ptr, q_ptr, p_ptr, inverse_ptr, q_lse_ptr, p_lse_ptr, best_ptr, seq_lens_ptr, temperature_ptr, seed_ptr,
    score_ptr, token_ptr, num_speculations, draft_vocab_size, vocab_size,
    HAS_MAP: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Max and argmax of log max(p - q, 0) + noise, and of log p + noise, over BLOCK tokens.

    p and q are those of the row after the accepted draft tokens. Without a rejection only the second counts.
    """
    wait_for_inputs(PDL)
    sequence, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    length, temperature = tl.load(seq_lens_ptr + sequence), tl.load(temperature_ptr + sequence)
    seed = tl.load(seed_ptr + sequence)
    accepted, rejected, _ = _decide(
        draft_ptr, q_ptr, p_ptr, inverse_ptr, q_lse_ptr, p_lse_ptr, best_ptr, sequence, length, temperature, seed,
        num_speculations, draft_vocab_size, vocab_size, HAS_MAP, ENTRIES,
    )  # fmt: skip
    col = tile * BLOCK + tl.arange(0, BLOCK)
    ok = col < vocab_size
    divisor = divisor_of(temperature)
    row = sequence * (num_speculations + 1) + accepted
    p = tl.load(p_ptr + row * vocab_size + col, mask=ok, other=float("-inf"))
    log_p = tl.div_rn(p, divisor) - tl.load(p_lse_ptr + row)
    noise = gumbel(seed, length + accepted + tl.zeros((BLOCK,), tl.int64), col, RESIDUAL)
    residual = tl.full((BLOCK,), float("-inf"), tl.float32)
    if rejected > 0:
        column, own = col, ok
        if HAS_MAP:
            column = tl.load(inverse_ptr + col, mask=ok, other=-1)
            own = ok & (column >= 0)
        row = sequence * num_speculations + accepted
        q = tl.load(q_ptr + row * draft_vocab_size + column, mask=own, other=float("-inf"))
        left = tl.exp(log_p) - tl.exp(tl.div_rn(q, divisor) - tl.load(q_lse_ptr + row))
        residual = tl.where(left > 0.0, tl.log(left) + noise, float("-inf"))
    for kind in tl.static_range(2):
        score = residual if kind == 0 else log_p + noise
        peak = tl.max(score, axis=0)
        place = (sequence * 2 + kind) * tiles + tile
        tl.store(score_ptr + place, peak)
        tl.store(token_ptr + place, tl.min(tl.where((score == peak) & ok, col, NO_TOKEN), axis=0))


@triton.jit
def _best_of_tiles(score_ptr, token_ptr, tiles, BLOCK: tl.constexpr):
    """The best score of the tiles, and the lowest token with it."""
    best, token = float("-inf"), NO_TOKEN
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + tile, mask=tile < tiles, other=float("-inf"))
        tokens = tl.load(token_ptr + tile, mask=tile < tiles, other=NO_TOKEN)
        peak = tl.max(score, axis=0)
        first = tl.min(tl.where(score == peak, tokens, NO_TOKEN), axis=0)
        token = tl.where(peak > best, first, token)
        best = tl.maximum(best, peak)
    return best, token


@triton.jit(do_not_specialize=["num_speculations"])
def accept_sampled_finish_kernel(
    draft_ptr, q_ptr, p_ptr, inverse_ptr, q_lse_ptr, p_lse_ptr, best_ptr, seq_lens_ptr, temperature_ptr, seed_ptr,
    score_ptr, token_ptr, accepted_ptr, next_ptr, num_speculations, draft_vocab_size, vocab_size, tiles,
    HAS_MAP: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence: the best of the tiles, or a greedy row's argmax; length += accepted + 1."""
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    length, temperature = tl.load(seq_lens_ptr + sequence), tl.load(temperature_ptr + sequence)
    accepted, _, finite = _decide(
        draft_ptr, q_ptr, p_ptr, inverse_ptr, q_lse_ptr, p_lse_ptr, best_ptr, sequence, length, temperature,
        tl.load(seed_ptr + sequence), num_speculations, draft_vocab_size, vocab_size, HAS_MAP, ENTRIES,
    )  # fmt: skip
    first = sequence * 2 * tiles
    score, token = _best_of_tiles(score_ptr + first, token_ptr + first, tiles, BLOCK)
    _, full = _best_of_tiles(score_ptr + first + tiles, token_ptr + first + tiles, tiles, BLOCK)
    token = tl.where(score > float("-inf"), token, full)  # p - q may round to nothing
    greedy = tl.load(best_ptr + sequence * (num_speculations + 1) + accepted)
    token = tl.where(temperature > 0, token, greedy)
    advance(seq_lens_ptr, accepted_ptr, next_ptr, sequence, accepted, tl.where(finite > 0, token, -1))


def _statistics(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp at the sequence's temperature, and arg-max, of every row of [B, K, V]."""
    batch, rows, vocab_size = logits.shape
    lse = logits.new_empty(batch, rows)
    best = lse.new_empty(batch, rows, dtype=torch.int32)
    if batch * rows:
        row_statistics_kernel[(batch * rows,)](
            logits, temperature, lse, best, rows, vocab_size, BLOCK=min(ROW_BLOCK, power_of_two(vocab_size, 16)),
            **launch_options(logits), num_warps=8,
        )  # fmt: skip
    return lse, best


def accept_sampled(
    draft: Tensor, draft_logits: Tensor, target_logits: Tensor, seq_lens: Tensor, temperature: Tensor, seed: Tensor,
    token_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _checks.temperatures(temperature)
    draft, q, p = draft.contiguous(), draft_logits.contiguous(), target_logits.contiguous()
    (batch, num_speculations), (draft_vocab_size, vocab_size) = draft.shape, (q.shape[2], p.shape[2])
    _checks.positions(seq_lens, num_speculations + 1, 2**63 - 1)
    accepted, next_token = torch.empty_like(seq_lens), torch.empty_like(seq_lens)
    if not batch:
        return accepted, next_token
    inverse = None
    if token_map is not None:  # the draft's column of each token
        columns = torch.arange(draft_vocab_size, dtype=torch.int32, device=draft.device)
        inverse = torch.full((vocab_size,), -1, dtype=torch.int32, device=draft.device).scatter_(0, token_map, columns)
    tiles = triton.cdiv(vocab_size, TILE)
    score = p.new_empty(batch, 2, tiles)
    token = score.new_empty(score.shape, dtype=torch.int32)
    options = {"HAS_MAP": inverse is not None, "ENTRIES": power_of_two(num_speculations + 1), **launch_options(p)}
    with on(p):
        q_lse, _ = _statistics(q, temperature)
        p_lse, best = _statistics(p, temperature)
        given = (draft, q, p, inverse, q_lse, p_lse, best, seq_lens, temperature, seed)
        accept_sampled_kernel[(batch, tiles)](
            *given, score, token, num_speculations, draft_vocab_size, vocab_size, **options, BLOCK=TILE, num_warps=4
        )
        accept_sampled_finish_kernel[(batch,)](
            *given, score, token, accepted, next_token, num_speculations, draft_vocab_size, vocab_size, tiles,
            **options, BLOCK=FINISH_BLOCK, num_warps=4,
        )  # fmt: skip
    return accepted, next_token
