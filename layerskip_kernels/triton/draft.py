"""draft: the launches of partial_forward and exit_head, and one that files a step and fetches the next embedding."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are typed by their launch)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_tokens, launch_options, on, power_of_two, wait_for_inputs
from .exit_head import exit_head
from .partial_forward import partial_forward

BLOCK = 1024  # entries of a state that one program moves


@triton.jit(do_not_specialize=["step", "steps", "rows"])
def draft_step_kernel(
    hidden_ptr, token_ptr, logit_ptr, lse_ptr, embedding_ptr, states_ptr, tokens_ptr, probability_ptr, next_ptr,
    width, step, steps, rows, min_probability, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Files a sequence's state, token and exp(logit - lse) of one step; next is the token's embedding.

    With a threshold a draft ends where its probability is below: that token and those after it are -1, and what comes
    after it has state 0 and probability 0. Without one, -1 marks logits that are not finite and ends nothing.
    """
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    place = sequence * steps + step
    before = tl.load(tokens_ptr + tl.where(step > 0, place - 1, place))
    before = tl.where(step > 0, tl.where(min_probability > 0, before, 0), 0)
    hidden = tl.load(hidden_ptr + sequence * width + column, mask=ok, other=0.0)
    tl.store(states_ptr + (sequence * rows + step) * width + column, tl.where(before < 0, 0.0, hidden), mask=ok)
    token = tl.load(token_ptr + sequence)
    chance = tl.where(before < 0, 0.0, tl.exp(tl.load(logit_ptr + sequence) - tl.load(lse_ptr + sequence)))
    if min_probability > 0:
        token = tl.where(chance >= min_probability, token, -1)  # of NaN, too
    source = embedding_ptr + tl.maximum(token, 0) * width  # what follows a token that is none is void
    tl.store(next_ptr + sequence * width + column, tl.load(source + column, mask=ok, other=0.0), mask=ok)
    if tl.program_id(1) == 0:
        tl.store(tokens_ptr + place, token)
        tl.store(probability_ptr + place, chance)


def _file(
    hidden: Tensor, said: Sequence[Tensor], embedding: Tensor, outputs: tuple[Tensor, ...], step: int, least: float
) -> Tensor:
    """File ``hidden`` [B, D] and what the head ``said`` of it as a step of the outputs; the next embeddings [B, D]."""
    states, tokens, probability = outputs
    following, (batch, width) = torch.empty_like(hidden), hidden.shape
    if batch:
        block = min(BLOCK, power_of_two(width))
        with on(hidden):
            draft_step_kernel[(batch, triton.cdiv(width, block))](
                hidden, *said, embedding, states, tokens, probability, following, width, step, tokens.shape[1],
                states.shape[1], least, BLOCK=block, **launch_options(hidden), num_warps=4,
            )  # fmt: skip
    return following


def draft(
    token: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    end: int,
    norm_weight: Tensor,
    head_weight: Tensor,
    eps: float,
    steps: int,
    extend: bool,
    token_map: Tensor | None = None,
    scale: Tensor | None = None,
    slots: Tensor | None = None,
    min_probability: float = 0.0,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `layerskip_kernels.draft`. A draft that has ended goes on without effect: to stop would be a host sync."""
    check_tokens(token, embedding.shape[0])
    tokens = token.new_empty(token.shape[0], steps)
    probability = torch.empty_like(tokens, dtype=torch.float32)
    states = embedding.new_empty(token.shape[0], steps + extend, embedding.shape[1])
    hidden = embedding[token.clamp_min(0)]
    for row in range(steps + extend):
        at = seq_lens + row
        hidden = partial_forward(hidden[:, None], weights, k_cache, v_cache, cos, sin, at, 0, end, eps, slots)[:, 0]
        if row == steps:
            limited = steps > 0 and min_probability > 0
            states[:, row] = hidden.masked_fill(tokens[:, -1:] < 0, 0) if limited else hidden
            break
        out, offset = None if logits is None else logits[:, row], None if temperature is None else at
        said = exit_head(hidden, norm_weight, head_weight, eps, token_map, scale, temperature, seed, offset, out)
        hidden = _file(hidden, said, embedding, (states, tokens, probability), row, min_probability)
    return tokens, states, probability
