"""`swiglu`: silu(x gate^T) * (x up^T), rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.reference import swiglu_ref

from .common import (
    DTYPES,
    MANY_ROWS,
    Inputs,
    assert_as_good_as,
    assert_rows_alone,
    assert_same_bits,
    assert_same_result,
    assert_threads_agree,
    double,
    strided,
)

SHAPES = [(1, 1, 1), (7, 9, 41), (9, 41, 7), (0, 16, 8), (3, 8, 0), (1, 576, 1536), (17, 576, 41), (6, 2048, 70)]


def eager(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def arguments(dtype: torch.dtype, rows: int, width: int, features: int) -> list[Tensor]:
    make = Inputs(dtype)
    return [make.normal(rows, width), make.weight(features, width), make.weight(features, width)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(path: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    args = arguments(dtype, *shape)
    assert_as_good_as(lk.swiglu(*args), eager(*args), swiglu_ref(*double(args)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(path: str, dtype: torch.dtype) -> None:
    for rows in range(1, 18):
        args = arguments(dtype, rows, 97, 23)
        assert_as_good_as(lk.swiglu(*args), eager(*args), swiglu_ref(*double(args)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", MANY_ROWS)
def test_many_rows(path: str, rows: int, dtype: torch.dtype) -> None:
    """Right to the last, and with the bits that it has alone."""
    args = arguments(dtype, rows, 97, 23)
    out = lk.swiglu(*args)
    assert_as_good_as(out, eager(*args), swiglu_ref(*double(args)), dtype)
    if path != "reference":
        assert_same_bits(lk.swiglu(args[0][-1:], *args[1:]), out[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_gates(path: str, dtype: torch.dtype) -> None:
    """silu(-large) is 0 and silu(large) the identity; neither overflows on the way."""
    x = torch.tensor([[200.0], [-200.0], [20.0], [-20.0], [0.0]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    expected = swiglu_ref(*double([x, one, one]))
    torch.testing.assert_close(lk.swiglu(x, one, one).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_place(path: str, dtype: torch.dtype) -> None:
    x, gate, up = arguments(dtype, 6, 40, 21)
    x[2, 3], gate[5, 7], up[9, 1] = float("nan"), float("nan"), float("nan")
    broken = torch.zeros(6, 21, dtype=torch.bool)
    broken[2], broken[:, 5], broken[:, 9] = True, True, True
    assert torch.equal(lk.swiglu(x, gate, up).isnan(), broken)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_activations(path: str, dtype: torch.dtype) -> None:
    x, gate, up = arguments(dtype, 6, 40, 21)
    expected = lk.swiglu(x, gate, up)
    for other in strided(x):
        assert_same_result(path, lk.swiglu(other, gate, up), expected)


def test_inputs_are_unchanged(path: str) -> None:
    args = arguments(torch.float32, 3, 40, 40)
    copies = [arg.clone() for arg in args]
    lk.swiglu(*args)
    assert_same_bits(args, copies)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 41, 576])
def test_rows_do_not_depend_on_each_other(isa: str, dtype: torch.dtype, width: int) -> None:
    x, gate, up = arguments(dtype, 17, width, 50)
    assert_rows_alone(lambda x: lk.swiglu(x, gate, up), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_agree(isa: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, 6, 576, 333)
    assert_threads_agree(lambda: lk.swiglu(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(path: str, dtype: torch.dtype) -> None:
    args = [arg.requires_grad_() for arg in arguments(dtype, 7, 41, 9)]
    grad = Inputs(dtype, seed=1).normal(7, 9)
    wide = [arg.detach().double().requires_grad_() for arg in args]
    truth = torch.autograd.grad(swiglu_ref(*wide), wide, grad.double())
    same = torch.autograd.grad(eager(*args), args, grad)
    for one, other, exact in zip(torch.autograd.grad(lk.swiglu(*args), args, grad), same, truth, strict=True):
        assert_as_good_as(one, other, exact, dtype)
