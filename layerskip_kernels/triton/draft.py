"""The draft loop: the launches of its ops, and one that records a row and loads the next embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, speculative
from ..schemas import Draft
from ._launch import launch_options, on, power_of_two, wait_for_inputs
from .exit_head import exit_head
from .partial_forward import partial_forward

BLOCK = 1024  # entries of a state per program


@triton.jit(do_not_specialize=["row", "num_speculations", "rows"])
def draft_step_kernel(
    hidden_ptr, token_ptr, logit_ptr, lse_ptr, embedding_ptr, states_ptr, tokens_ptr, probability_ptr, next_ptr,
    vocab_size, hidden_size, row, num_speculations, rows, draft_threshold, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write one row's state, token and probability exp(logit - lse), and the token's embedding to next.

    The thresholds' rules are those of `speculative.record_draft`.
    """
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < hidden_size
    place = sequence * num_speculations + row
    before = tl.load(tokens_ptr + tl.where(row > 0, place - 1, place))
    before = tl.where(row > 0, tl.where(draft_threshold > 0, before, 0), 0)
    hidden = tl.load(hidden_ptr + sequence * hidden_size + column, mask=ok, other=0.0)
    tl.store(states_ptr + (sequence * rows + row) * hidden_size + column, tl.where(before < 0, 0.0, hidden), mask=ok)
    token = tl.load(token_ptr + sequence)
    probability = tl.where(before < 0, 0.0, tl.exp(tl.load(logit_ptr + sequence) - tl.load(lse_ptr + sequence)))
    if draft_threshold > 0:
        token = tl.where(probability >= draft_threshold, token, -1)  # -1 for NaN, too
    known = (token >= 0) & (token < vocab_size)
    source = embedding_ptr + tl.where(known, token, 0) * hidden_size  # after a -1 any valid index will do
    tl.store(next_ptr + sequence * hidden_size + column, tl.load(source + column, mask=ok, other=0.0), mask=ok)
    if tl.program_id(1) == 0:
        tl.store(tokens_ptr + place, token)
        tl.store(probability_ptr + place, probability)


def record_draft(
    state: Tensor, head_output: Sequence[Tensor] | None, embedding: Tensor, out: Draft, row: int,
    draft_threshold: float
) -> Tensor | None:  # fmt: skip
    if head_output is None:
        return speculative.record_draft(state, None, embedding, out, row, draft_threshold)
    next_embedding, (batch, hidden_size) = torch.empty_like(state), state.shape
    _checks.tokens(head_output[0].clamp_min(0), embedding.shape[0])
    if batch:
        block = min(BLOCK, power_of_two(hidden_size))
        with on(state):
            draft_step_kernel[(batch, triton.cdiv(hidden_size, block))](
                state, *head_output, embedding, out.states, out.tokens, out.probability, next_embedding,
                embedding.shape[0], hidden_size, row, out.tokens.shape[1], out.states.shape[1], draft_threshold,
                BLOCK=block, num_warps=4, **launch_options(state),
            )  # fmt: skip
    return next_embedding


_OPS: dict[str, Callable[..., Any]] = {"partial_forward": partial_forward, "exit_head": exit_head}


def draft(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """On a GPU a stopped draft keeps running without effect: no host sync."""
    return speculative.compose_draft(_OPS, *args, record=record_draft)
