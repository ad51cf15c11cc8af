"""Launch options: the interpreter, programmatic dependent launch, and the tuned configurations of weight streaming.

BLOCK_K and the number of splits fix the order of additions; they follow from the depth and the dtype alone. Tuning
chooses the rest, so a tuned kernel gives the bits of an untuned one, except for the last bits of `exit_head`'s
log-sum-exp. No configuration depends on the number of rows: a row's bits never depend on the other rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

from ..files import cache_directory

# triton decorates its own helpers on import: whether TRITON_INTERPRET was set by then
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
# triton 3.4's gdc_wait does not compile
PDL_COMPILES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)
ROWS = 16  # the smallest tile of tl.dot; M = 1 and M = K + 1 share it, and so their bits


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the stream's next kernel start, then wait for the writes of the kernels before (sm_90 and later)."""
    if PDL:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()


@triton.jit
def fetch_weights(w_ptr, col, col_ok, depth, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """Prefetch the first KiB of some rows of a weight [*, depth] into L2.

    Weights are no kernel's output, so this may run before `wait_for_inputs` and overlap with the kernels before.
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
    """Programmatic dependent launch if the GPU has it; fused multiply-add on, whatever triton's default is."""
    if tensor.is_cuda and not INTERPRETED and _pdl(tensor.device.index):
        return {"PDL": True, "launch_pdl": True, "enable_fp_fusion": True}
    return {"PDL": False, "enable_fp_fusion": True}


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``tensor`` current for a launch."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two of at least ``size`` and ``least``."""
    return max(least, triton.next_power_of_2(size))


MAX_DEPTH = 4096  # columns that one program sums; a deeper product is split


@dataclass(frozen=True)
class Config:
    """Weight rows of a tile, warps and pipeline stages of a launch."""

    block_n: int
    num_warps: int
    num_stages: int


SPACE = (
    *(Config(block, warps, stages) for block, warps in ((16, 2), (32, 4)) for stages in (3, 4, 5)),
    *(Config(64, 4, stages) for stages in (3, 4)),
)


def block_k(itemsize: int) -> int:
    """Columns of a tile: 256 bytes of a weight row in the dtype of the activations."""
    return 256 // itemsize


def streaming_options(x: Tensor, config: Config) -> dict[str, Any]:
    """Arguments of a launch that streams weights for the rows of ``x`` [R, depth]."""
    columns = block_k(x.element_size())
    return {
        "ROWS": ROWS, "BLOCK_N": config.block_n, "BLOCK_K": columns, "EVEN": x.shape[1] % columns == 0,
        "INTERPRETED": INTERPRETED, "num_warps": config.num_warps, "num_stages": config.num_stages, **launch_options(x),
    }  # fmt: skip


def splits(depth: int) -> int:
    """The number of programs that share the columns of a product; their sums are added in order."""
    return max(1, depth // MAX_DEPTH)


def shared_bytes(op: str, config: Config) -> int:
    """Shared memory of a launch: the tiles of x and of the weights, for each stage in flight."""
    weights = 2 if op == "swiglu" else 1
    return (ROWS + weights * config.block_n) * 256 * max(1, config.num_stages - 1)


@cache
def shared_limit(index: int) -> int:
    """Shared memory available to a thread block, in bytes."""
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def fitting(op: str, config: Config, limit: int) -> Config:
    """Reduce the stages until the configuration fits."""
    while config.num_stages > 1 and shared_bytes(op, config) > limit:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def default(op: str, weight: Tensor) -> Config:
    """The untuned configuration for ``weight`` [outputs, depth]: about 100 programs or more, within shared memory."""
    config = _unlimited_default(op, weight)
    return fitting(op, config, shared_limit(weight.device.index)) if weight.is_cuda else config


def _unlimited_default(op: str, weight: Tensor) -> Config:
    outputs = weight.shape[0]
    if weight.stride(0) % 16:  # triton copies single elements, through registers
        return Config(16, 4, 2)
    if op == "exit_head" or outputs >= 32768:
        return Config(64, 4, 4)
    return Config(32, 4, 4) if outputs >= 4096 else Config(16, 2, 4)


def cache_file(gpu: str) -> Path:
    """The file of the configurations tuned with this version of triton on a GPU."""
    return cache_directory() / f"triton-{triton.__version__}-{gpu.replace(' ', '-').replace('/', '-')}.json"


@cache
def _tuned(gpu: str) -> dict[str, Config]:
    path = cache_file(gpu)
    if not path.exists():
        return {}
    return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}


def _keep(gpu: str, key: str, config: Config) -> None:
    table = _tuned(gpu)
    table[key] = config
    path = cache_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({name: asdict(entry) for name, entry in table.items()}, indent=1))
    scratch.replace(path)


def _fastest(op: str, run: Callable[[Config], object], limit: int) -> Config:
    """Time the configurations that fit ``limit`` bytes of shared memory."""
    space = [config for config in SPACE if shared_bytes(op, config) <= limit]
    return min(space, key=lambda config: triton.testing.do_bench(lambda: run(config), warmup=5, rep=20))


def pick(op: str, weight: Tensor, rows: int, run: Callable[[Config], object]) -> Config:
    """Choose the configuration for ``weight``: the tuned one, or with LAYERSKIP_AUTOTUNE=1 the fastest, or the default.

    Only calls of at most `ROWS` rows are timed, as in decoding: a prompt that came first would fix what suits prompts.

    Parameters
    ----------
    op : str
    weight : Tensor [outputs, depth]
        Its shape, dtype and GPU are the key; the number of rows is not, so that it cannot change a row's bits.
    rows : int
    run : callable
        Launches the kernel with a configuration. Never called during the capture of a CUDA graph.
    """
    outputs, depth = weight.shape
    if not weight.is_cuda:
        return default(op, weight)
    gpu = torch.cuda.get_device_name(weight.device)
    key = f"{op} {str(weight.dtype).removeprefix('torch.')} {outputs}x{depth}"
    if key in _tuned(gpu):
        return _tuned(gpu)[key]
    wanted = os.environ.get("LAYERSKIP_AUTOTUNE") == "1" and rows <= ROWS
    if not wanted or torch.cuda.is_current_stream_capturing():
        return default(op, weight)
    config = _fastest(op, run, shared_limit(weight.device.index))
    _keep(gpu, key, config)
    return config
