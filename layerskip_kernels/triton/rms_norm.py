"""Root-mean-square norm, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import inverse_rms
from ._launch import launch_options, on, power_of_two, wait_for_inputs

MAX_BLOCK = 128  # columns summed at a time: the tree needs all of them in each thread, and more would spill
OUT_BLOCK = 2048


def norm_block(width: int) -> dict[str, int]:
    """The blocks of a norm over ``width``: they fix the order of additions, so all kernels share them."""
    block = min(power_of_two(width, 2), MAX_BLOCK)
    return {"BLOCK": block, "STEPS": block.bit_length() - 1, "UNROLL": min(16, triton.cdiv(width, block))}


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, width, eps, BLOCK: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
    OUT_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * weight of one row."""
    wait_for_inputs(PDL)
    offset = tl.program_id(0).to(tl.int64) * width
    inverse = inverse_rms(x_ptr + offset, width, eps, BLOCK, STEPS, UNROLL)
    for start in range(0, width, OUT_BLOCK):
        column = start + tl.arange(0, OUT_BLOCK)
        ok = column < width
        x = tl.load(x_ptr + offset + column, mask=ok, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + offset + column, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=ok)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    if x.numel():
        with on(x):
            rms_norm_kernel[(x.numel() // width,)](
                x, weight, out, width, eps, **norm_block(width),
                OUT_BLOCK=min(power_of_two(width), OUT_BLOCK), **launch_options(x), num_warps=4,
            )  # fmt: skip
    return out
