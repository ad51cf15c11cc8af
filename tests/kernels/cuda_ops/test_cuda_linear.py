"""`linear` and `swiglu` of csrc/cuda."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels.reference import linear_ref, swiglu_ref

from ..common import DTYPES, MANY_ROWS, Inputs, assert_as_good_as, assert_rows_alone, assert_same_bits, double
from .cases import misaligned
from .runners import Emulated, Ops

# R, D_in, D_out: below a tile and a chunk; odd; one past tiles; deeper than the ring of weights in shared memory;
# many passes. A block takes up to 16, 32 or 64 rows of x.
SHAPES = [(1, 3, 1), (5, 41, 21), (9, 104, 33), (17, 72, 16), (2, 2200, 18), *((rows, 9, 5) for rows in MANY_ROWS)]
ROWS_OF_A_BLOCK = (17, 32, 33, 48, 64, 65)
SHAPES += [(rows, 72, 18) for rows in ROWS_OF_A_BLOCK] + [(40, 2200, 18)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "outputs"), SHAPES)
@pytest.mark.parametrize("more", [False, True])
def test_linear_float64(ops: Ops, rows: int, depth: int, outputs: int, more: bool, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight = make.normal(rows, depth), make.weight(outputs, depth)
    bias, residual = (make.normal(outputs), make.normal(rows, outputs)) if more else (None, None)
    eager = F.linear(x, weight, bias) if residual is None else F.linear(x, weight, bias) + residual
    actual = ops.linear(x, weight, bias, residual)
    assert_as_good_as(actual, eager, linear_ref(*double([x, weight, bias, residual])), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "features"), SHAPES)
def test_swiglu_float64(ops: Ops, rows: int, depth: int, features: int, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, gate, up = make.normal(rows, depth), make.weight(features, depth), make.weight(features, depth)
    eager = F.silu(F.linear(x, gate)) * F.linear(x, up)
    actual = ops.swiglu(x, gate, up)
    assert_as_good_as(actual, eager, swiglu_ref(*double([x, gate, up])), dtype)


def test_swiglu_of_large_gates(ops: Ops) -> None:
    """exp(-x) overflows below -88, where the result is 0."""
    x, gate = torch.tensor([[1.0], [-1.0]]), torch.tensor([[200.0]])
    assert ops.swiglu(x, gate, gate).tolist() == [[40000.0], [0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(ops: Ops, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight, up, residual = make.normal(18, 136), make.weight(20, 136), make.weight(20, 136), make.normal(18, 20)
    assert_rows_alone(lambda x, residual: ops.linear(x, weight, None, residual), x, residual)
    assert_rows_alone(lambda x: ops.swiglu(x, weight, up), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth"), [*((rows, 136) for rows in ROWS_OF_A_BLOCK), (40, 1400)])
def test_many_rows_have_the_bits_of_few(ops: Ops, rows: int, depth: int, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, residual = make.normal(rows, depth), make.normal(rows, 20)
    weight, up, bias = make.weight(20, depth), make.weight(20, depth), make.normal(20)
    products, activated = ops.linear(x, weight, bias, residual), ops.swiglu(x, weight, up)
    for first in range(0, rows, 7):
        few = slice(first, min(first + 7, rows))
        assert_same_bits(ops.linear(x[few], weight, bias, residual[few]), products[few], f"(rows from {first})")
        assert_same_bits(ops.swiglu(x[few], weight, up), activated[few], f"(rows from {first})")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 20, 40])
def test_alignment_does_not_matter(ops: Ops, rows: int, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight, up = make.normal(rows, 104), make.weight(20, 104), make.weight(20, 104)
    assert_same_bits(ops.linear(misaligned(x), weight), ops.linear(x, weight))
    assert_same_bits(ops.linear(x, misaligned(weight)), ops.linear(x, weight))
    assert_same_bits(ops.swiglu(x, weight, misaligned(up)), ops.swiglu(x, weight, up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 20, 40])
def test_the_order_of_threads_does_not_matter(emulated: type[Emulated], rows: int, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight = make.normal(rows, 1400), make.weight(20, 1400)
    results: list[Tensor] = [emulated(seed, arch).linear(x, weight) for seed in range(3) for arch in (80, 90)]
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_no_columns(ops: Ops) -> None:
    bias = torch.tensor([1.0, 2.0])
    assert ops.linear(torch.empty(3, 0), torch.empty(2, 0), bias).tolist() == [[1.0, 2.0]] * 3
