"""Products by AMX's tiles, on the processor or emulated: the bits of their order of summation, in plain torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk

from .common import TILES, Inputs, native_isa, running_on

COLUMNS = 32  # of a tile
LEAST_NORMAL = 2.0**-126
# Row counts around one, two and four groups of sixteen; output rows and widths around the sizes of a tile.
ROWS = (1, 2, 15, 16, 17, 32, 33, 48, 63, 65, 131)
SHAPES = ((16, 32), (1, 1), (15, 24), (17, 56), (64, 64), (65, 33), (100, 576), (200, 160))


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_on(request.param):
        yield native_isa(request.param)


def normal(x: Tensor) -> Tensor:
    """Replace denormals by zeros, as the instruction does with operands and results."""
    return torch.where(x.abs() < LEAST_NORMAL, torch.zeros_like(x), x)


def in_tile_order(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in fp32: in each tile of 32 columns, the even products and the odd ones are summed apart."""
    pad = -x.shape[1] % COLUMNS
    wide_x, wide_weight = (normal(torch.nn.functional.pad(one.float(), (0, pad))) for one in (x, weight))
    total = torch.zeros(len(x), len(weight))
    for start in range(0, wide_x.shape[1], COLUMNS):
        even, odd = torch.zeros_like(total), torch.zeros_like(total)
        for k in range(start, start + COLUMNS, 2):
            even = normal(even + torch.outer(wide_x[:, k], wide_weight[:, k]))
            odd = normal(odd + torch.outer(wide_x[:, k + 1], wide_weight[:, k + 1]))
        total = normal(total + normal(even + odd))
    return total


def bits(x: Tensor) -> Tensor:
    """The bits of bf16, all NaN alike."""
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(torch.int16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_order_of_the_sums(rows: int, shape: tuple[int, int], tiles: str) -> None:
    make = Inputs(torch.bfloat16)
    x, weight = make.normal(rows, shape[1]), make.normal(*shape)
    torch.testing.assert_close(
        lk.linear(x, weight).view(torch.int16), in_tile_order(x, weight).bfloat16().view(torch.int16), rtol=0, atol=0
    )


def test_rows_do_not_mix(tiles: str) -> None:
    """A row ends inside a tile. Past its end x is padded with zeros, and zero times the next row's infinity is NaN."""
    make = Inputs(torch.bfloat16)
    x, weight = make.normal(5, 24), make.normal(21, 24)
    expected = lk.linear(x, weight)
    weight[7] = torch.inf
    others = [row for row in range(21) if row != 7]
    assert torch.equal(lk.linear(x, weight)[:, others], expected[:, others])


PAST_THE_END = """
import ctypes
import mmap
import sys

import torch

import layerskip_kernels as lk

lk.set_cpu_isa(sys.argv[1])
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 17 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 16 * page), page, 0) == 0
for d_out, width in ((1, 32), (17, 64), (21, 24), (40, 56), (100, 33)):
    size = d_out * width
    weight = torch.frombuffer(memory, dtype=torch.bfloat16, count=size, offset=16 * page - 2 * size).view(d_out, width)
    for rows in (1, 16, 20, 40):
        lk.linear(torch.ones(rows, width, dtype=torch.bfloat16), weight.fill_(1))
print("read")
"""


def test_no_memory_past_the_weight_is_read(tiles: str) -> None:
    """The page after the weight cannot be read."""
    done = subprocess.run([sys.executable, "-c", PAST_THE_END, tiles], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def test_calls_of_different_sizes_in_turn(tiles: str) -> None:
    """No shape of the registers stays from the call before."""
    make = Inputs(torch.bfloat16)
    x, weight = make.normal(40, 72), make.normal(50, 72)
    whole = lk.linear(x, weight)
    for rows, d_out in ((40, 50), (3, 50), (40, 7), (1, 1), (17, 33), (40, 50)):
        assert torch.equal(lk.linear(x[:rows], weight[:d_out]), whole[:rows, :d_out]), (rows, d_out)


def any_bits(make: Inputs, *shape: int) -> Tensor:
    """Numbers of all sizes: denormals, infinities, and NaN among them."""
    return make.integers(-(2**15), 2**15, *shape).to(torch.int16).view(torch.bfloat16)


def test_special_numbers(tiles: str) -> None:
    make = Inputs(torch.bfloat16)
    x, weight = make.normal(9, 64), make.normal(40, 64)
    x[1, 3], x[2, 5], x[3, 8] = torch.nan, torch.inf, -torch.inf
    weight[4, 5], weight[6, 9] = 0, torch.inf
    x[4] *= 2.0**-120  # some of the products are denormal
    weight[8:12] *= 2.0**-8
    x[5] *= 2.0**-131  # all operands are
    expected = in_tile_order(x, weight)
    assert expected.isnan().any()
    assert expected.isinf().any()
    assert (expected[5, [0, 1, 2]] == 0).all()
    assert torch.equal(bits(lk.linear(x, weight)), bits(expected.bfloat16()))


@pytest.mark.parametrize("make_numbers", [any_bits, Inputs.normal], ids=["any bits", "normal"])
def test_the_emulation_is_the_processor(make_numbers) -> None:
    make = Inputs(torch.bfloat16, seed=3)
    x, weight = make_numbers(make, 64, 96), make_numbers(make, 256, 96)
    results = []
    for name in TILES:
        with running_on(name):
            results.append(bits(lk.linear(x, weight)))
    assert torch.equal(*results)
