"""Accept the leading draft tokens that match the target."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._launch import launch_options, on, power_of_two, wait_for_inputs

LARGEST = tl.constexpr(2**63 - 1)


@triton.jit
def advance(seq_lens_ptr, accepted_ptr, next_ptr, sequence, accepted, token):
    """Store a sequence's result; length += accepted + 1. A length that cannot advance stays, and there is no token."""
    length, accepted = tl.load(seq_lens_ptr + sequence), accepted.to(tl.int64)
    ok = (length >= 0) & (length < LARGEST - accepted)
    tl.store(accepted_ptr + sequence, tl.where(ok, accepted, 0))
    tl.store(next_ptr + sequence, tl.where(ok, token, -1).to(tl.int64))
    tl.store(seq_lens_ptr + sequence, tl.where(ok, length + accepted + 1, length))


@triton.jit(do_not_specialize=["num_speculations"])
def accept_greedy_kernel(
    draft_ptr,
    target_ptr,
    seq_lens_ptr,
    accepted_ptr,
    next_ptr,
    num_speculations,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a sequence: a = min{k : draft[k] != target[k] or draft[k] < 0 or k = K}; length += a + 1."""
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    drafts = tl.load(draft_ptr + sequence * num_speculations + k, mask=k < num_speculations, other=-1)
    targets = tl.load(target_ptr + sequence * (num_speculations + 1) + k, mask=k < num_speculations, other=-1)
    agrees = (drafts == targets) & (drafts >= 0)
    accepted = tl.min(tl.where(agrees, BLOCK, tl.minimum(k, num_speculations)), axis=0)
    token = tl.load(target_ptr + sequence * (num_speculations + 1) + accepted)
    advance(seq_lens_ptr, accepted_ptr, next_ptr, sequence, accepted, token)


def accept_greedy(draft: Tensor, target: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    draft, target = draft.contiguous(), target.contiguous()
    batch, num_speculations = draft.shape
    _checks.positions(seq_lens, num_speculations + 1, 2**63 - 1)
    accepted, next_token = torch.empty_like(seq_lens), torch.empty_like(seq_lens)
    if batch:
        with on(draft):
            accept_greedy_kernel[(batch,)](
                draft, target, seq_lens, accepted, next_token, num_speculations,
                BLOCK=power_of_two(num_speculations + 1), **launch_options(draft), num_warps=1,
            )  # fmt: skip
    return accepted, next_token
