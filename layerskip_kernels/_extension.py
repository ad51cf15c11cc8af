"""Loads the compiled libraries once and keeps the reason when one can't be loaded."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from . import _ops  # noqa: F401  (defines what the libraries implement)


def _load(name: str) -> str | None:
    """Load ``name`` from beside this file; the reason when that fails, None when it worked."""
    path = Path(__file__).with_name(f"{name}.abi3.so")
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return _load("_cuda")


cpu_reason = _load("_cpu")
cuda_reason = _load_cuda()

if cpu_reason is not None:
    warnings.warn(
        f"layerskip_kernels runs on its torch reference on the CPU: {cpu_reason}. "
        "Install g++ and reinstall to get the native kernels; without them decoding is about 10 times slower.",
        RuntimeWarning,
        stacklevel=2,
    )


def _isa_op(name: str) -> str:
    if cpu_reason is not None:
        raise RuntimeError(f"no native CPU library: {cpu_reason}")
    return str(torch.ops.layerskip_native.cpu_isa(name))


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: avx512_bf16, avx512, avx2 or portable."""
    return _isa_op("")


def set_cpu_isa(name: str) -> str:
    """Make the CPU kernels use one instruction set, while no op runs; returns the one used before.

    Parameters
    ----------
    name : {"avx512_bf16", "avx512", "avx2", "portable"}

    Raises
    ------
    RuntimeError
        If the name is unknown, this machine does not have it, or the library was not built.
    """
    before = cpu_isa()
    _isa_op(name)
    return before
