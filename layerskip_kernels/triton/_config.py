"""Launch configurations of the kernels that stream weights, their defaults and their tuning.

What fixes the order of additions (BLOCK_K, the number of splits) follows from the depth and the dtype alone. Tuning
chooses among the rest, so a tuned kernel yields the same bits as an untuned one, but for the last
bits of `exit_head`'s log-sum-exp. No key holds the number of rows: a row's bits never depend on its company.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..files import cache_directory
from ._launch import INTERPRETED, ROWS, launch_options

DEEPEST = 4096  # columns that one program sums; a deeper product is split


@dataclass(frozen=True)
class Config:
    """Tile height in weight rows, warps and pipeline stages of one launch."""

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
    """Arguments of a launch that streams weights past the rows of ``x`` [R, depth]."""
    columns = block_k(x.element_size())
    return {
        "ROWS": ROWS, "BLOCK_N": config.block_n, "BLOCK_K": columns, "EVEN": x.shape[1] % columns == 0,
        "INTERPRETED": INTERPRETED, "num_warps": config.num_warps, "num_stages": config.num_stages, **launch_options(x),
    }  # fmt: skip


def splits(depth: int) -> int:
    """Programs that share the columns of one product; their sums are added in order."""
    return max(1, depth // DEEPEST)


def default(op: str, weight: Tensor) -> Config:
    """A configuration for ``weight`` [outputs, depth], chosen so that some 100 programs or more exist."""
    outputs = weight.shape[0]
    if weight.stride(0) % 16:  # triton then copies single elements, through registers
        return Config(16, 4, 2)
    if op == "exit_head" or outputs >= 32768:
        return Config(64, 4, 4)
    return Config(32, 4, 4) if outputs >= 4096 else Config(16, 2, 4)


def cache_file(card: str) -> Path:
    """Where the tuned configurations of a card are kept."""
    return cache_directory() / f"triton-{card.replace(' ', '-').replace('/', '-')}.json"


@cache
def _tuned(card: str) -> dict[str, Config]:
    path = cache_file(card)
    if not path.exists():
        return {}
    return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}


def _keep(card: str, key: str, config: Config) -> None:
    table = _tuned(card)
    table[key] = config
    path = cache_file(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({name: asdict(entry) for name, entry in table.items()}, indent=1))
    scratch.replace(path)


def _fastest(run: Callable[[Config], object]) -> Config:
    return min(SPACE, key=lambda config: triton.testing.do_bench(lambda: run(config), warmup=5, rep=20))


def pick(op: str, weight: Tensor, run: Callable[[Config], object]) -> Config:
    """The configuration for ``weight``: the tuned one, the default, or with LAYERSKIP_AUTOTUNE=1 the fastest, kept.

    Parameters
    ----------
    op : str
    weight : Tensor [outputs, depth]
        Its shape, dtype and card are the key; the number of rows is not, so that it cannot change a row's bits.
    run : callable
        Launches the kernel with a configuration. Never called while a CUDA graph is captured.
    """
    outputs, depth = weight.shape
    if not weight.is_cuda:
        return default(op, weight)
    card = torch.cuda.get_device_name(weight.device)
    key = f"{op} {str(weight.dtype).removeprefix('torch.')} {outputs}x{depth}"
    if key in _tuned(card):
        return _tuned(card)[key]
    if os.environ.get("LAYERSKIP_AUTOTUNE") != "1" or torch.cuda.is_current_stream_capturing():
        return default(op, weight)
    config = _fastest(run)
    _keep(card, key, config)
    return config
