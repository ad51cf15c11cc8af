"""Triton kernels, one file per op. Importing this package does not import triton: the first call of an op does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ..dispatch import device_of, forced, implements
from ..formats import format_of, is_interleaved, is_packed, takes_packed
from ..schemas import REQUIRED_WEIGHTS, SCHEMAS, LayerWeights

FILES = {"swiglu": "linear", "early_exit_loss_backward": "early_exit_loss"}  # where the file is not named as the op
PACKED = ("linear", "swiglu", "partial_forward")  # the ops that take packed weights
OLDEST = (3, 4)


@cache
def _installed() -> str | None:
    """Why triton cannot be used at all, or None."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed (pip install 'layerskip-kernels[triton]')"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is older than {'.'.join(map(str, OLDEST))}"
    return None


@cache
def _device_reason(kind: str, index: int | None) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if kind == "cpu":
        interpreted = import_module("._launch", __name__).INTERPRETED
        return None if interpreted else "the tensors are on cpu and TRITON_INTERPRET=1 was not set at start"
    if kind != "cuda":
        return f"the tensors are on {kind}"
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def supports(*args: Any) -> str | None:
    """Return why the ops that take no packed weights cannot serve a call, or None."""
    return _supports_plain(*args) or ("packed weights are not served" if takes_packed(args) else None)


def supports_packed(*args: Any) -> str | None:
    """Return why the ops that take packed weights cannot serve a call, or None; of the layers it checks the first."""
    return _supports_plain(*args) or next(filter(None, map(_format_reason, _products(args))), None)


def _products(args: tuple[Any, ...]) -> Iterator[tuple[int, list[Tensor]]]:
    """The width and the weights of each launch of linear, swiglu, or a layer."""
    width = args[0].shape[-1]
    if isinstance(args[1], Tensor):
        yield width, [one for one in args[1:] if isinstance(one, Tensor) and is_packed(one)]
    elif args[1]:
        w = LayerWeights(*args[1][: len(REQUIRED_WEIGHTS)])
        yield from ((width, [one]) for one in (w.q, w.k, w.v))
        yield from ((w.q.shape[0], [w.o]), (width, [w.gate, w.up]), (w.gate.shape[0], [w.down]))


def _format_reason(product: tuple[int, list[Tensor]]) -> str | None:
    width, weights = product
    if any(map(is_interleaved, weights)):
        return "interleaved weights are not served, formats.rows_of makes rows of them"
    if any(is_packed(one) and format_of(one, width).is_float for one in weights):
        return "fp8 weights are not served"
    different = len({(one.dtype, one.shape[-1]) for one in weights}) > 1
    return "gate and up of different formats are not served" if different else None


def _supports_plain(*args: Any) -> str | None:
    reason = _installed()
    if reason is not None:
        return reason
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "float64 is not served"
    device = tensors[0].device
    return _device_reason(device.type, device.index)


@cache
def _warn_unproven() -> None:
    """Warn once that Triton was chosen on a GPU because the CUDA library is not available."""
    warnings.warn(
        "Triton kernels serve this GPU, and they have not run on one yet: they were tested in triton's interpreter and "
        "compiled. `python -m benchmarks.gpu` tests them here; LAYERSKIP_BACKEND=triton selects them without this "
        "warning, LAYERSKIP_BACKEND=reference avoids them. layerskip_kernels.explain says why no CUDA kernel serves.",
        RuntimeWarning,
        stacklevel=2,
    )


def _lazy(file: str, op: str) -> Callable[..., Any]:
    """Return the launcher of ``op``, which imports its kernels when it is first called."""

    def call(*args: Any) -> Any:
        if device_of(args).type == "cuda" and forced() is None:
            _warn_unproven()
        return getattr(import_module(f".{file}", __name__), op)(*args)

    call.__name__ = call.__qualname__ = f"{op}_triton"
    return call


for _op in SCHEMAS:
    implements(_op, "triton", supports_packed if _op in PACKED else supports)(_lazy(FILES.get(_op, _op), _op))
