"""rms_norm, linear, swiglu and accept_greedy against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cases import DTYPES, agrees, normal, on_backend, same_bits

import layerskip_kernels as lk
from tests.kernels.common import MANY_ROWS

MANY = [(rows, 40, 21) for rows in MANY_ROWS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 7, 41), (3, 2053), (1, 4096), (2, 5000), (17, 1), (8,), (0, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = normal(0, *shape, dtype=dtype, device=device)
    agrees(lk.rms_norm, x, normal(1, shape[-1], dtype=dtype, device=device), 1e-5)


def test_rms_norm_of_a_strided_tensor(device: torch.device) -> None:
    agrees(lk.rms_norm, normal(0, 9, 41, 7, device=device).transpose(1, 2), normal(1, 41, device=device), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "depth", "outputs"), [(1, 41, 23), (7, 256, 100), (16, 136, 16), (33, 100, 65), *MANY]
)
@pytest.mark.parametrize(("bias", "residual"), list(itertools.product([False, True], repeat=2)))
def test_linear(
    rows: int, depth: int, outputs: int, bias: bool, residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    agrees(
        lk.linear,
        normal(0, rows, depth, dtype=dtype, device=device),
        normal(1, outputs, depth, dtype=dtype, device=device, by=depth**-0.5),
        normal(2, outputs, dtype=dtype, device=device) if bias else None,
        normal(3, rows, outputs, dtype=dtype, device=device) if residual else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [8192, 12300])
def test_linear_split_over_its_depth(depth: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = (normal(s, n, depth, dtype=dtype, device=device, by=depth**-0.25) for s, n in ((0, 5), (1, 37)))
    residual = normal(3, 5, 37, dtype=dtype, device=device)
    agrees(lk.linear, x, weight, normal(2, 37, dtype=dtype, device=device), residual)


def test_linear_without_rows(device: torch.device) -> None:
    agrees(lk.linear, normal(0, 0, 8, device=device), normal(1, 4, 8, device=device))
    agrees(lk.linear, normal(0, 3, 8, device=device), normal(1, 0, 8, device=device))


def test_linear_of_strided_rows(device: torch.device) -> None:
    x, residual = normal(0, 48, 5, device=device).T, normal(2, 12, 5, device=device).T
    agrees(lk.linear, x, normal(1, 12, 48, device=device), None, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "features"), [(1, 41, 23), (7, 256, 100), (33, 100, 65), (0, 8, 4), *MANY])
def test_swiglu(rows: int, depth: int, features: int, dtype: torch.dtype, device: torch.device) -> None:
    x = normal(0, rows, depth, dtype=dtype, device=device)
    gate, up = (normal(s, features, depth, dtype=dtype, device=device, by=depth**-0.5) for s in (1, 2))
    agrees(lk.swiglu, x, gate, up)


@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_accept_greedy_on_every_draft(drafted: int, device: torch.device) -> None:
    drafts = torch.tensor(list(itertools.product([-1, 0, 1], repeat=drafted)), dtype=torch.int64)
    drafts = drafts.view(3**drafted, drafted)
    for target in itertools.product([-1, 0, 1], repeat=drafted + 1):
        targets = torch.tensor(target).expand(len(drafts), -1)
        lengths = torch.arange(len(drafts))
        agrees(lk.accept_greedy, drafts.to(device), targets.to(device), lengths.to(device))


def test_accept_greedy_advances_in_place(device: torch.device) -> None:
    draft, target = torch.tensor([[4, 5, 6], [4, 9, 6]]), torch.tensor([[4, 5, 6, 7], [4, 5, 6, 7]])
    lengths = torch.tensor([10, 20])
    out, args = on_backend("triton", lk.accept_greedy, draft.to(device), target.to(device), lengths.to(device))
    assert out.accepted.tolist() == [3, 1]
    assert out.next_token.tolist() == [7, 5]
    assert args[2].tolist() == [14, 22]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype, device: torch.device) -> None:
    x = normal(0, 35, 264, dtype=dtype, device=device)
    weight, other = (normal(s, 50, 264, dtype=dtype, device=device, by=264**-0.5) for s in (1, 2))
    residual, norm = normal(3, 35, 50, dtype=dtype, device=device), normal(4, 264, dtype=dtype, device=device)
    with lk.use_backend("triton"):
        normed, product = lk.rms_norm(x, norm, 1e-5), lk.linear(x, weight, None, residual)
        gated = lk.swiglu(x, weight, other)
        for span in (slice(0, 1), slice(3, 10), slice(15, 33), slice(34, 35)):
            same_bits(lk.rms_norm(x[span], norm, 1e-5), normed[span])
            same_bits(lk.linear(x[span], weight, None, residual[span]), product[span])
            same_bits(lk.swiglu(x[span], weight, other), gated[span])
