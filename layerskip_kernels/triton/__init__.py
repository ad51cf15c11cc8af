"""Triton kernels, one file per op family.

This module imports without triton; the kernels are loaded by the first call that they serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

OPS = {
    "rms_norm": "norm",
    "linear": "linear",
    "swiglu": "linear",
    "rope_kv_append": "attention",
    "verify_attention": "attention",
    "exit_head": "exit_head",
    "partial_forward": "partial_forward",
    "draft": "draft",
    "accept_greedy": "accept",
    "accept_sampled": "accept_sampled",
    "speculative_round": "speculative_round",
    "early_exit_loss": "early_exit_loss",
    "early_exit_loss_backward": "early_exit_loss",
}
OLDEST = (3, 4)

# Not a ContextVar: on a card autograd runs the backward pass in a thread of its own, which would not see it.
_skip_below = 0.0


@contextmanager
def skip_gradients_below(threshold: float) -> Iterator[None]:
    """Let `early_exit_loss` on Triton skip, within the block, tiles that hardly matter to the gradient.

    Off by default. A tile of rows and tokens is skipped where every slope s_v = |softmax_v - one-hot_v| in it is below
    ``threshold``; the loss itself is not touched. With w the share of a row in the loss (exit weight over the number of
    labels), x its normed state and head_v the head's row of token v, the gradient

    - to x loses at most w · Σ s_v |head_v| over the skipped tokens, hence w · min(2, threshold · V) · max |head_v|;
    - to head_v loses at most threshold · Σ w |x| over the rows that were skipped for v.

    So it suits a model whose distributions are peaked. One that spreads its softmax over the whole vocabulary, as at
    the start of training, has many slopes that are small each and matter together.

    The setting holds for the process, and for the backward pass as well as (with a frozen head) the forward pass: both
    belong inside the block.

    Parameters
    ----------
    threshold : float
        In [0, 1); 0 skips nothing.

    Raises
    ------
    ValueError
        If it is outside.
    """
    global _skip_below
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    before, _skip_below = _skip_below, float(threshold)
    try:
        yield
    finally:
        _skip_below = before


def negligible_gradient() -> float:
    """The threshold of `skip_gradients_below` in force, 0 where there is none."""
    return _skip_below


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
def _device(kind: str, index: int | None) -> str | None:
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
    """Why no Triton kernel can serve a call with these arguments, or None."""
    reason = _installed()
    if reason is not None:
        return reason
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "float64 is not served"
    device = tensors[0].device
    return _device(device.type, device.index)


def implementation(op: str) -> Callable[..., Any]:
    """The launcher of ``op``; its kernels are imported when it is first called."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f".{OPS[op]}", __name__), op)(*args)

    call.__name__ = call.__qualname__ = f"{op}_triton"
    return call
