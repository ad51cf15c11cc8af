"""`rms_norm`: x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import layerskip_kernels as lk
from layerskip_kernels.reference import rms_norm_ref

from .common import (
    DTYPES,
    Inputs,
    assert_as_good_as,
    assert_rows_alone,
    assert_same_bits,
    assert_same_result,
    assert_threads_agree,
    double,
    strided,
)

SHAPES = [(1,), (8,), (1, 1), (7, 9), (9, 41), (2, 3, 64), (0, 16), (3, 0, 5), (17, 576), (5, 2048), (3, 1, 2, 1)]


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(path: str, shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    make = Inputs(dtype)
    x, weight = make.normal(*shape), make.norm(shape[-1])
    truth = rms_norm_ref(*double([x, weight]), eps)
    assert_as_good_as(lk.rms_norm(x, weight, eps), F.rms_norm(x, shape[-1:], weight, eps), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_scales(path: str, dtype: torch.dtype, scale: float) -> None:
    """Tiny inputs, where eps rules, and squares that fp16 could not hold: the statistics are fp32."""
    make = Inputs(dtype)
    x, weight = make.normal(5, 200, scale=scale), make.norm(200)
    truth = rms_norm_ref(*double([x, weight]), 1e-5)
    assert_as_good_as(lk.rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), truth, dtype)


def test_known_values(path: str) -> None:
    out = lk.rms_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 2.0]), 0.5)
    root = (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(out, torch.tensor([[3 / root, 8 / root], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_activations(path: str, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight = make.normal(6, 5, 40), make.norm(40)
    expected = lk.rms_norm(x, weight, 1e-5)
    for other in strided(x):
        assert not other.is_contiguous()
        assert_same_result(path, lk.rms_norm(other, weight, 1e-5), expected)


def test_inputs_are_unchanged(path: str) -> None:
    make = Inputs(torch.float32)
    x, weight = make.normal(3, 40), make.norm(40)
    copies = x.clone(), weight.clone()
    out = lk.rms_norm(x, weight, 1e-5)
    assert_same_bits((x, weight), copies)
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 9, 41, 576])
def test_rows_do_not_depend_on_each_other(isa: str, dtype: torch.dtype, width: int) -> None:
    make = Inputs(dtype)
    weight = make.norm(width)
    assert_rows_alone(lambda x: lk.rms_norm(x, weight, 1e-5), make.normal(17, width))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_agree(isa: str, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight = make.normal(67, 2048), make.norm(2048)
    assert_threads_agree(lambda: lk.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 9), (2, 3, 64)])
def test_gradients(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    make = Inputs(dtype)
    leaves = [make.normal(*shape).requires_grad_(), make.norm(shape[-1]).requires_grad_()]
    grad = make.normal(*shape)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(rms_norm_ref(*wide, 1e-5), wide, grad.double())
    eager = torch.autograd.grad(F.rms_norm(leaves[0], shape[-1:], leaves[1], 1e-5), leaves, grad)
    actual = torch.autograd.grad(lk.rms_norm(*leaves, 1e-5), leaves, grad)
    for one, same, exact in zip(actual, eager, truth, strict=True):
        assert_as_good_as(one, same, exact, dtype)
