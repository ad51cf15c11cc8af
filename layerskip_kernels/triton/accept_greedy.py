"""accept_greedy."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are typed by their launch)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch_options, on, power_of_two, wait_for_inputs


@triton.jit(do_not_specialize=["drafted"])
def accept_greedy_kernel(
    draft_ptr, target_ptr, seq_lens_ptr, accepted_ptr, next_ptr, drafted, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program a sequence: a = min{k : draft[k] != target[k] or draft[k] < 0 or k = K}; length += a + 1."""
    wait_for_inputs(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    drafts = tl.load(draft_ptr + sequence * drafted + k, mask=k < drafted, other=-1)
    targets = tl.load(target_ptr + sequence * (drafted + 1) + k, mask=k < drafted, other=-1)
    agrees = (drafts == targets) & (drafts >= 0)
    accepted = tl.min(tl.where(agrees, BLOCK, tl.minimum(k, drafted)), axis=0)
    tl.store(accepted_ptr + sequence, accepted.to(tl.int64))
    tl.store(next_ptr + sequence, tl.load(target_ptr + sequence * (drafted + 1) + accepted))
    tl.store(seq_lens_ptr + sequence, tl.load(seq_lens_ptr + sequence) + accepted + 1)


def accept_greedy(draft: Tensor, target: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """See `layerskip_kernels.accept_greedy`."""
    draft, target = draft.contiguous(), target.contiguous()
    batch, drafted = draft.shape
    accepted, following = torch.empty_like(seq_lens), torch.empty_like(seq_lens)
    if batch:
        with on(draft):
            accept_greedy_kernel[(batch,)](
                draft, target, seq_lens, accepted, following, drafted,
                BLOCK=power_of_two(drafted + 1), **launch_options(draft), num_warps=1,
            )  # fmt: skip
    return accepted, following
