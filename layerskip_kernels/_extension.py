"""Loads the compiled libraries and registers the ops that they implement, or the reason why one cannot be loaded."""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import _registration, dispatch  # noqa: F401  (_registration defines the ops)
from .formats import is_packed
from .schemas import PUBLIC, REQUIRED_WEIGHTS, SCHEMAS, has_native, native_ops


def _path(name: str) -> Path:
    """The library's file; a package for the hub has one for all devices, named after its namespace."""
    one_for_all = Path(__file__).with_name(f"{PUBLIC}.abi3.so")
    if one_for_all.exists():
        return one_for_all
    return Path(__file__).with_name(f"{name}.abi3.so")


def _load(name: str) -> str | None:
    """Load ``name`` from this file's folder; return why that fails, or None."""
    path = _path(name)
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


@dataclass(frozen=True)
class CudaBuild:
    """What the CUDA library was built for, and the driver's CUDA version: 1000 major + 10 minor, or 0 without one."""

    archs: str
    toolkit: int
    driver: int


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_reason(build: CudaBuild) -> str | None:
    """Why the driver cannot run the library, or None. A driver serves every toolkit of its major version."""
    if build.driver == 0:
        return "no NVIDIA driver was found"
    if build.driver // 1000 < build.toolkit // 1000:
        return (
            f"the NVIDIA driver serves CUDA {_version(build.driver)}, but the library was built with CUDA "
            f"{_version(build.toolkit)}: update the driver, or rebuild with nvcc {build.driver // 1000}.x on PATH"
        )
    return None


def capability_reason(build: CudaBuild, capability: tuple[int, int], name: str) -> str | None:
    """Why a GPU of this compute capability cannot run the library, or None."""
    major, minor = capability
    if major < 8:
        return f"{name} has compute capability {major}.{minor}, the CUDA kernels need 8.0"
    for arch in build.archs.split(";"):
        digits = arch.strip("compute_af ")
        built = (int(digits[:-1]), int(digits[-1]))
        if "compute_" in arch:
            # A driver compiles no PTX newer than itself; only machine code is compatible across minor versions.
            fits = built <= capability and not arch.endswith(("a", "f")) and build.driver >= build.toolkit
        else:
            fits = built == capability or (built[0] == major and built[1] <= minor and not arch.endswith("a"))
        if fits:
            return None
    return (
        f"{name} has compute capability {major}.{minor}, but the library was built for {build.archs}: rebuild with "
        f"LAYERSKIP_CUDA_ARCHS={major}{minor}"
    )


def _cuda_build() -> CudaBuild:
    library = ctypes.CDLL(str(_path("_cuda")))
    library.layerskip_cuda_archs.restype = ctypes.c_char_p
    archs = library.layerskip_cuda_archs().decode()
    return CudaBuild(archs, library.layerskip_cuda_toolkit(), library.layerskip_cuda_driver())


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    reason = _load("_cuda")
    if reason is None and not hasattr(ctypes.CDLL(str(_path("_cuda"))), "layerskip_cuda_archs"):
        reason = f"{_path('_cuda').name} has no CUDA kernels"  # one for all devices, built without them
    return reason or driver_reason(_cuda_build())


@cache
def device_reason(index: int) -> str | None:
    """Why the loaded CUDA library cannot serve tensors on ``cuda:<index>``, or None."""
    name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    return capability_reason(_cuda_build(), torch.cuda.get_device_capability(index), name)


def formats_reason(args: tuple[Any, ...]) -> str | None:
    """Why the CUDA kernels do not take the weight formats of the first layer, or None."""
    for arg in args:
        if isinstance(arg, (list, tuple)) and len(arg) >= len(REQUIRED_WEIGHTS):
            first = dict(zip(REQUIRED_WEIGHTS, arg, strict=False))
            for names in (("q", "k", "v"), ("gate", "up")):
                if len({first[name].shape[-1] if is_packed(first[name]) else 0 for name in names}) > 1:
                    return f"{', '.join(names[:-1])} and {names[-1]} of different formats are not served"
    return None


def _supports_cuda(*args: Any) -> str | None:
    return _on_cuda(*args) or device_reason(dispatch.device_of(args).index) or formats_reason(args)


_on_cuda = dispatch.serves_device("cuda")


def _register(device: str, reason: str | None, **conditions: Any) -> None:
    """Register the ops that the library of ``device`` implements, or why it is missing."""
    if reason is not None:
        dispatch.absent(device, reason)
        return
    for op in SCHEMAS:
        if has_native(op, device):
            dispatch.implements(op, device, **conditions)(getattr(native_ops, op).default)


cpu_reason = _load("_cpu")
cuda_reason = _load_cuda()
_register("cpu", cpu_reason, supports=dispatch.serves_device("cpu"), checks=True)
_register("cuda", cuda_reason, supports=_supports_cuda)

if cpu_reason is not None:
    warnings.warn(
        f"layerskip_kernels runs on its torch reference on the CPU: {cpu_reason}. "
        "Install g++ and reinstall to get the native kernels; without them decoding is about 10 times slower.",
        RuntimeWarning,
        stacklevel=2,
    )

if hasattr(os, "register_at_fork"):
    # OpenMP's threads do not survive a fork: a child that uses more than its own thread waits for them forever.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _isa_op(name: str) -> str:
    if cpu_reason is not None:
        raise RuntimeError(f"no native CPU library: {cpu_reason}")
    return str(native_ops.cpu_isa(name))


def cpu_isa() -> str:
    """Return the name of the instruction set that the CPU kernels use."""
    return _isa_op("")


def multiplies_panels() -> bool:
    """Return whether the CPU kernels are faster on interleaved weights than on rows, for bf16 activations."""
    return cpu_reason is None and cpu_isa() in ("amx", "avx512_bf16")


def set_cpu_isa(name: str) -> str:
    """Select the instruction set of the CPU kernels while no op runs; return the one used before.

    Parameters
    ----------
    name : {"amx", "avx512_bf16", "avx512", "avx2", "portable"}, on aarch64 {"neon_bf16", "neon", "portable"}
        Or "amx_emulated", for tests: AMX's instructions in plain C++.

    Raises
    ------
    RuntimeError
        If the name is unknown, this machine does not have it, or the library was not built.
    """
    before = cpu_isa()
    _isa_op(name)
    return before
