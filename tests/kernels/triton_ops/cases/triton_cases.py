"""What the cases share: tensors, tolerances, and a call on two backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels as lk

# Sums are taken in fp32 in another order than the reference's, then rounded once. fp32: some hundred additions at
# 2^-24 each. fp16, bf16: the rounding may fall on the neighbour, one unit in the last place.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Attention's weights are rounded to the dtype before they meet the values: as many units again.
ATTENTION_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
DTYPES = tuple(TOLERANCES)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device, by: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * by).to(device, dtype)


def on_backend(backend: str, function: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]]:
    """The result, and the arguments as the call left them."""
    copies = [arg.clone() if isinstance(arg, Tensor) and arg.is_contiguous() else arg for arg in args]
    with lk.use_backend(backend):
        return function(*copies), copies


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


def agrees(function: Callable[..., Any], *args: Any, tolerances: dict[torch.dtype, float] = TOLERANCES) -> Any:
    """Run on triton and on the reference, compare results and everything written in place; returns triton's result."""
    ours, our_args = on_backend("triton", function, *args)
    truth, true_args = on_backend("reference", function, *args)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    tolerance = tolerances.get(tensors[0].dtype, 0.0)
    outputs = (ours,) if isinstance(ours, Tensor) else ours
    for mine, true in zip(outputs, (truth,) if isinstance(truth, Tensor) else truth, strict=True):
        assert mine.shape == true.shape
        assert mine.dtype == true.dtype
        close(mine, true, 0.0 if mine.dtype == torch.int64 else tolerance)
    for mine, true in zip(our_args, true_args, strict=True):
        if isinstance(mine, Tensor):
            close(mine, true, tolerance)
    return ours


def same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {actual.numel()} elements differ"
