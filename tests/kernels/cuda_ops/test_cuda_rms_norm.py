"""`rms_norm` of csrc/cuda."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from layerskip_kernels.reference import rms_norm_ref

from ..common import DTYPES, Inputs, assert_as_good_as, assert_rows_alone, assert_same_bits, double
from .cases import misaligned
from .runners import Ops

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 41), (19, 96), (17, 520)])
def test_float64(ops: Ops, rows: int, width: int, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight = make.normal(rows, width), make.norm(width)
    actual = ops.rms_norm(x, weight, EPS)
    assert_as_good_as(actual, F.rms_norm(x, (width,), weight, EPS), rms_norm_ref(*double([x, weight]), EPS), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(ops: Ops, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    weight = make.norm(104)
    assert_rows_alone(lambda x: ops.rms_norm(x, weight, EPS), make.normal(18, 104))


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_does_not_matter(ops: Ops, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, weight = make.normal(3, 104), make.norm(104)
    assert_same_bits(ops.rms_norm(misaligned(x), weight, EPS), ops.rms_norm(x, weight, EPS))
