"""What every launcher needs: the interpreter, programmatic dependent launch, grids."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are typed by their launch)
from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

# triton's own helpers are decorated when triton is imported, so this tells whether TRITON_INTERPRET was set by then
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
# triton 3.4's gdc_wait does not compile
PDL_COMPILES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)
ROWS = 16  # the least tile of tl.dot; M = 1 and M = K + 1 share it, and so share their bits


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel of the stream start, then wait until the kernels before have written (sm_90 and later)."""
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()


@triton.jit
def fetch_weights(w_ptr, col, col_ok, depth, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """Ask for the first KiB of some rows of a weight [*, depth] in L2: what may be done before `wait_for_inputs`.

    No kernel ahead writes weights, so programmatic dependent launch hides their way from memory, too.
    """
    if PDL:
        size: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
        column = tl.arange(0, 8)[None, :] * (128 // size)
        line = w_ptr + tl.where(col_ok, col, 0).to(tl.int64)[:, None] * depth + tl.minimum(column, depth - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )


@cache
def _pdl(index: int) -> bool:
    if torch.version.hip is not None or not PDL_COMPILES or os.environ.get("LAYERSKIP_PDL") == "0":
        return False
    return torch.cuda.get_device_capability(index) >= (9, 0)


def launch_options(tensor: Tensor) -> dict[str, Any]:
    """Programmatic dependent launch where the card has it; fused multiply-add on, whatever triton's default is."""
    if tensor.is_cuda and not INTERPRETED and _pdl(tensor.device.index):
        return {"PDL": True, "launch_pdl": True, "enable_fp_fusion": True}
    return {"PDL": False, "enable_fp_fusion": True}


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of ``tensor``, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two(size: int, least: int = 1) -> int:
    """The block that covers ``size``."""
    return max(least, triton.next_power_of_2(size))
