"""Launch configurations of the kernels that stream weights, their defaults and their tuning.

What fixes the order of additions (BLOCK_K, the number of splits) follows from the depth and the dtype alone. Tuning
chooses among the rest, so a tuned kernel yields the same bits as an untuned one, but for the last
bits of `exit_head`'s log-sum-exp. No key holds the number of rows: a row's bits never depend on its company.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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


def shared_bytes(op: str, config: Config) -> int:
    """Shared memory of a launch: the tiles of x and of the weights, for each stage that is under way."""
    weights = 2 if op == "swiglu" else 1
    return (ROWS + weights * config.block_n) * 256 * max(1, config.num_stages - 1)


@cache
def shared_limit(index: int) -> int:
    """Shared memory that a block of a card may have, in bytes."""
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def fitting(op: str, config: Config, limit: int) -> Config:
    """The configuration, with so many stages fewer that it fits."""
    while config.num_stages > 1 and shared_bytes(op, config) > limit:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def default(op: str, weight: Tensor) -> Config:
    """A configuration for ``weight`` [outputs, depth], chosen so that some 100 programs or more exist."""
    config = _roomy(op, weight)
    return fitting(op, config, shared_limit(weight.device.index)) if weight.is_cuda else config


def _roomy(op: str, weight: Tensor) -> Config:
    """That of a card with enough shared memory."""
    outputs = weight.shape[0]
    if weight.stride(0) % 16:  # triton then copies single elements, through registers
        return Config(16, 4, 2)
    if op == "exit_head" or outputs >= 32768:
        return Config(64, 4, 4)
    return Config(32, 4, 4) if outputs >= 4096 else Config(16, 2, 4)


def cache_file(card: str) -> Path:
    """Where the configurations are kept that this version of triton was tuned to on a card."""
    return cache_directory() / f"triton-{triton.__version__}-{card.replace(' ', '-').replace('/', '-')}.json"


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


def _fastest(op: str, run: Callable[[Config], object], limit: int) -> Config:
    """Of those that fit ``limit`` bytes of shared memory."""
    space = [config for config in SPACE if shared_bytes(op, config) <= limit]
    return min(space, key=lambda config: triton.testing.do_bench(lambda: run(config), warmup=5, rep=20))


def pick(op: str, weight: Tensor, rows: int, run: Callable[[Config], object]) -> Config:
    """The configuration for ``weight``: the tuned one, the default, or with LAYERSKIP_AUTOTUNE=1 the fastest, kept.

    Only a call with the rows of one tile is timed, as decoding has them: a prompt that happened to come first would fix
    what is best for prompts.

    Parameters
    ----------
    op : str
    weight : Tensor [outputs, depth]
        Its shape, dtype and card are the key; the number of rows is not, so that it cannot change a row's bits.
    rows : int
        Of this call.
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
    wanted = os.environ.get("LAYERSKIP_AUTOTUNE") == "1" and rows <= ROWS
    if not wanted or torch.cuda.is_current_stream_capturing():
        return default(op, weight)
    config = _fastest(op, run, shared_limit(weight.device.index))
    _keep(card, key, config)
    return config
