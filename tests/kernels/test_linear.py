"""`linear`: x weight^T + bias + residual, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.reference import linear_ref

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

# R, D_in, D_out
SHAPES = [(1, 1, 1), (7, 9, 41), (9, 41, 7), (0, 16, 8), (3, 8, 0), (1, 576, 1536), (17, 576, 41), (6, 2048, 70)]
ROWS = range(1, 18)  # past the rows that a kernel keeps in registers, whatever their number up to 8
EXTRAS = ["plain", "bias", "residual", "bias and residual"]


def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def arguments(dtype: torch.dtype, rows: int, width: int, out: int, extras: str) -> list[Tensor | None]:
    make = Inputs(dtype)
    bias = make.normal(out) if "bias" in extras else None
    return [
        make.normal(rows, width),
        make.weight(out, width),
        bias,
        make.normal(rows, out) if "res" in extras else None,
    ]


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(path: str, shape: tuple[int, int, int], dtype: torch.dtype, extras: str) -> None:
    args = arguments(dtype, *shape, extras)
    assert_as_good_as(lk.linear(*args), eager(*args), linear_ref(*double(args)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 97])
def test_row_counts(path: str, dtype: torch.dtype, width: int) -> None:
    for rows in ROWS:
        args = arguments(dtype, rows, width, 23, "bias and residual")
        assert_as_good_as(lk.linear(*args), eager(*args), linear_ref(*double(args)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", MANY_ROWS)
def test_many_rows(path: str, rows: int, dtype: torch.dtype) -> None:
    """Right to the last, and with the bits that it has alone."""
    args = arguments(dtype, rows, 97, 23, "bias and residual")
    out = lk.linear(*args)
    assert_as_good_as(out, eager(*args), linear_ref(*double(args)), dtype)
    if path != "reference":
        x, weight, bias, residual = args
        assert_same_bits(lk.linear(x[-1:], weight, bias, residual[-1:]), out[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(path: str, dtype: torch.dtype) -> None:
    """Small integers have one right answer in every dtype and order of summation."""
    make = Inputs(dtype)
    x, weight = make.integers(-2, 3, 5, 37), make.integers(-1, 2, 19, 37)
    expected = x @ weight.T
    assert expected.abs().max() < 256
    assert_same_bits(lk.linear(x.to(dtype), weight.to(dtype)), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_place(path: str, dtype: torch.dtype) -> None:
    x, weight, *_ = arguments(dtype, 6, 40, 21, "plain")
    x[2, 3] = float("nan")
    weight[5, 7] = float("inf")
    out = lk.linear(x, weight)
    broken = torch.zeros(6, 21, dtype=torch.bool)
    broken[2], broken[:, 5] = True, True
    assert torch.equal(~out.isfinite(), broken)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_activations(path: str, dtype: torch.dtype) -> None:
    x, weight, bias, residual = arguments(dtype, 6, 40, 21, "bias and residual")
    expected = lk.linear(x, weight, bias, residual)
    for other, more in zip(strided(x), strided(residual), strict=True):
        assert_same_result(path, lk.linear(other, weight, bias, more), expected)
    one_row = x[:1].expand(6, 40)
    assert_same_result(path, lk.linear(one_row, weight), lk.linear(one_row.contiguous(), weight))


def test_inputs_are_unchanged(path: str) -> None:
    args = arguments(torch.float32, 3, 40, 40, "bias and residual")
    copies = [arg.clone() for arg in args]
    out = lk.linear(*args)
    assert_same_bits(args, copies)
    assert out.data_ptr() not in [arg.data_ptr() for arg in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 41, 576])
def test_rows_do_not_depend_on_each_other(isa: str, dtype: torch.dtype, width: int) -> None:
    x, weight, bias, residual = arguments(dtype, 17, width, 50, "bias and residual")
    assert_rows_alone(lambda x, residual: lk.linear(x, weight, bias, residual), x, residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_agree(isa: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, 6, 576, 333, "bias and residual")
    assert_threads_agree(lambda: lk.linear(*args))


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(path: str, dtype: torch.dtype, extras: str) -> None:
    args = [None if arg is None else arg.requires_grad_() for arg in arguments(dtype, 7, 41, 9, extras)]
    grad = Inputs(dtype, seed=1).normal(7, 9)
    wide = [None if arg is None else arg.detach().double().requires_grad_() for arg in args]

    def gradients(out: Tensor, leaves: list[Tensor | None], grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)

    truth = gradients(linear_ref(*wide), wide, grad.double())
    same = gradients(eager(*args), args, grad)
    for one, other, exact in zip(gradients(lk.linear(*args), args, grad), same, truth, strict=True):
        assert_as_good_as(one, other, exact, dtype)
