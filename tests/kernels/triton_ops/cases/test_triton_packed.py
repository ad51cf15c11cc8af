"""linear, swiglu and partial_forward with packed weights against the reference."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, agrees, normal, on_backend, same_bits

import layerskip_kernels as lk
from layerskip_kernels.formats import FORMATS, quantize
from tests.kernels.common import run
from tests.kernels.examples import example

INTEGERS = [name for name, form in FORMATS.items() if not form.is_float]
# Every format in bf16, and every kind of values in the other dtypes: the interpreter is slow.
CASES = [(name, torch.bfloat16) for name in INTEGERS] + [
    (name, dtype) for name in ("int8", "int4", "int4_zero") for dtype in DTYPES if dtype != torch.bfloat16
]


def packed(seed: int, name: str, rows: int, depth: int, device: torch.device) -> torch.Tensor:
    return quantize(normal(seed, rows, depth, device=torch.device("cpu"), by=depth**-0.5), name).to(device)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize(("rows", "depth", "outputs"), [(7, 256, 40), (33, 128, 3)])
def test_linear(rows: int, depth: int, outputs: int, name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = normal(0, rows, depth, dtype=dtype, device=device), packed(1, name, outputs, depth, device)
    agrees(lk.linear, x, weight)
    bias, residual = (normal(2, *size, dtype=dtype, device=device) for size in ((outputs,), (rows, outputs)))
    agrees(lk.linear, x, weight, bias, residual)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize(("rows", "depth", "features"), [(17, 128, 35), (0, 128, 4)])
def test_swiglu(rows: int, depth: int, features: int, name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weights = (
        normal(0, rows, depth, dtype=dtype, device=device),
        [packed(seed, name, features, depth, device) for seed in (1, 2)],
    )
    agrees(lk.swiglu, x, *weights)


@pytest.mark.parametrize("name", ["int8", "int4_zero_g128"])
def test_a_row_does_not_depend_on_the_batch(name: str, device: torch.device) -> None:
    x = normal(0, 35, 128, dtype=torch.float16, device=device)
    weight, other = (packed(seed, name, 40, 128, device) for seed in (1, 2))
    with lk.use_backend("triton"):
        product, gated = lk.linear(x, weight), lk.swiglu(x, weight, other)
        for span in (slice(0, 1), slice(3, 10), slice(15, 33), slice(34, 35)):
            same_bits(lk.linear(x[span], weight), product[span])
            same_bits(lk.swiglu(x[span], weight, other), gated[span])


def test_partial_forward(device: torch.device) -> None:
    """Of q, k and v each its own format; `down`, narrower than a group, plain."""
    args = {
        name: arg.to(device) if isinstance(arg, torch.Tensor) else arg
        for name, arg in example("partial_forward").items()
    }
    names = {1: "int8", 2: "int4", 3: "int4_zero", 4: "int8", 6: "int4", 7: "int4"}
    weights = [quantize(w, names[i % 9]) if i % 9 in names else w for i, w in enumerate(args["weights"])]
    args["weights"] = [weight.to(device) for weight in weights]
    ours, _ = on_backend("triton", lambda *given: run("partial_forward", *given), *args.values())
    truth, _ = on_backend("reference", lambda *given: run("partial_forward", *given), *args.values())
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
