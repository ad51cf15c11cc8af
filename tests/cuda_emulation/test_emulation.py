"""The stand-in itself: right results, and the mistakes that it is there to catch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from . import EmulationError, Library, library, planted, unavailable
from .build import HERE, ROOT

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
NAN = float("nan")
SEEDS = range(4)


def nans(*shape: int) -> Tensor:
    return torch.full(shape, NAN)


def row_sum(lib: Library, x: Tensor, seed: int = 0) -> Tensor:
    out = nans(len(x))
    lib.call("row_sum", x, out, *x.shape, x.dtype, writes=(out,), seed=seed)
    return out


def reverse(lib: Library, seed: int = 0) -> None:
    x, out = torch.arange(256.0), nans(256)
    lib.call("reverse", x, out, 256, writes=(out,), seed=seed)
    assert torch.equal(out, x.flip(0))


def product(lib: Library, dtype: torch.dtype, seed: int = 0) -> None:
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), nans(16, 8)
    lib.call("product", a, b, out, dtype, writes=(out,), seed=seed)
    torch.testing.assert_close(out, a.float() @ b.float().T, atol=1e-5, rtol=1e-5)


def chain(lib: Library, seed: int = 0, arch: int = 90) -> None:
    x, y, out = torch.randn(64), nans(64), nans(64)
    lib.call("chain", x, y, out, 64, False, writes=(y, out), seed=seed, arch=arch)
    assert torch.equal(out, 2 * x + 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shuffles_shared_memory_and_barriers(dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(5, 301).to(dtype)
    torch.testing.assert_close(row_sum(library("sample"), x, seed), x.float().sum(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_asynchronous_copies(seed: int) -> None:
    reverse(library("sample"), seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_products(dtype: torch.dtype) -> None:
    product(library("sample"), dtype)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("seed", SEEDS)
def test_dependent_launches(seed: int, arch: int) -> None:
    chain(library("sample"), seed, arch)


@pytest.mark.parametrize("seed", SEEDS)
def test_catches_a_read_before_the_wait(seed: int) -> None:
    """On a GPU that has dependent launches; elsewhere the launch before has ended."""
    x, y, out = torch.randn(64), torch.zeros(64), nans(64)
    with pytest.raises(EmulationError, match=r"double_kernel.* writes what a launch after it has read before its dep"):
        library("sample").call("chain", x, y, out, 64, True, writes=(y, out), seed=seed)
    library("sample").call("chain", x, y, out, 64, True, writes=(y, out), seed=seed, arch=80)
    assert torch.equal(out, 2 * x + 1)


def test_matrices_are_transposed() -> None:
    x, out = torch.arange(64, dtype=torch.int16), torch.zeros(64, dtype=torch.int16)
    library("sample").call("transpose", x, out, writes=(out,))
    assert torch.equal(out.view(8, 8), x.view(8, 8).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_those_of_torch(dtype: torch.dtype) -> None:
    """Every half to float, and floats at, between and past the halves back."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide, narrow = nans(2**16), torch.empty_like(halves)
    library("sample").call("to_float", halves, wide, 2**16, dtype, writes=(wide,))
    torch.testing.assert_close(wide, halves.float(), rtol=0, atol=0, equal_nan=True)
    finite = halves.float()[halves.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    huge = torch.tensor([65519.0, 65520.0, 3.3e38, 3.4e38, float("inf"), 1e-30, 1e-45, NAN])
    floats = torch.cat([torch.nextafter(middle, middle + s) for s in (-1, 1)] + [middle, huge, -huge, finite])
    narrow = torch.empty(len(floats), dtype=dtype)
    library("sample").call("from_float", floats, narrow, len(floats), dtype, writes=(narrow,))
    assert torch.equal(narrow.isnan(), floats.isnan())
    assert torch.equal(narrow[~floats.isnan()].view(torch.int16), floats[~floats.isnan()].to(dtype).view(torch.int16))


def test_counts_what_is_moved() -> None:
    x, out = torch.randn(3, 256), nans(3)
    read, written = library("sample").call("row_sum", x, out, 3, 256, x.dtype, writes=(out,), count=True)
    assert read.kernel == "row_sum_kernel<float>"
    assert (read.launches, read.requested, read.by_block, read.distinct) == (1, 3072, 3072, 3072)
    assert (written.requested, written.written) == (0, 12)


def test_an_input_must_not_be_written() -> None:
    x, out = torch.randn(3, 8), nans(3)
    with pytest.raises(EmulationError, match=r"row_sum_kernel.* writes an input: byte \d of argument 1"):
        library("sample").call("row_sum", x, out, 3, 8, x.dtype)


@pytest.mark.parametrize(("rows", "outs"), [(2, 3), (3, 2)])
def test_a_buffer_that_is_too_small(rows: int, outs: int) -> None:
    x, out = torch.randn(rows, 9), nans(outs)
    with pytest.raises(EmulationError, match=r"touches byte \d+ of argument \d .*sample.cuh:\d+"):
        library("sample").call("row_sum", x, out, 3, 9, x.dtype, writes=(out,))


def test_a_misaligned_view() -> None:
    x, out = torch.randn(129)[1:], nans(128)
    with pytest.raises(EmulationError, match=r"cp.async of 16 bytes .*misaligned"):
        library("sample").call("reverse", x, out, 128, writes=(out,))


def test_a_launch_that_the_device_refuses() -> None:
    with pytest.raises(EmulationError, match="chain gave CUDA error 9"):
        library("sample").call("chain", None, None, None, 1025, False)


@cache
def broken() -> Library:
    """Each kernel of sample.cuh with one line missing or wrong."""
    return planted(
        "sample",
        "broken",
        HERE / "sample.cuh",
        ("  __syncthreads();\n  if (threadIdx.x == 0) out", "  if (threadIdx.x == 0) out"),
        ("  ptx::cp_async_wait<0>();\n", ""),
        ("  __syncwarp();\n", ""),
        ("  ptx::dependency_wait();\n", ""),
    )


@cache
def wild() -> Library:
    """Writes past the end, waits that end never, and too early an end."""
    return planted(
        "sample",
        "wild",
        HERE / "sample.cuh",
        ("out[blockIdx.x] = partial[0]", "out[blockIdx.x + 1] = partial[0]"),
        ("ptx::cp_async<16>(tile + 4 * threadIdx.x", "ptx::cp_async<16>(tile + 4 + 4 * threadIdx.x"),
        ("  ptx::ldmatrix(columns", "  if (lane < 16) ptx::ldmatrix(columns"),
        ("x[threadIdx.x];", "reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(x) | 2)[threadIdx.x];"),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_catches_a_missing_barrier(seed: int) -> None:
    with pytest.raises(EmulationError, match=r"row_sum_kernel.*shared memory that thread \d+ .*no barrier between"):
        row_sum(broken(), torch.randn(2, 300), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_catches_a_missing_wait_for_copies(seed: int) -> None:
    with pytest.raises(EmulationError, match=r"reverse_kernel.*a cp.async of thread \d+ is still filling"):
        reverse(broken(), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_catches_a_missing_warp_barrier(seed: int) -> None:
    with pytest.raises(EmulationError, match=r"product_kernel.*no barrier between"):
        product(broken(), torch.float16, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_catches_a_missing_dependency_wait(seed: int) -> None:
    with pytest.raises(EmulationError, match=r"increment_kernel.* before dependency_wait\(\), writes byte"):
        chain(broken(), seed)


def test_catches_a_write_past_the_end() -> None:
    with pytest.raises(EmulationError, match=r"touches byte 8 of argument 1 \(float32 \[2\]\), which has 8"):
        row_sum(wild(), torch.randn(2, 300))


def test_catches_a_copy_past_the_end_of_shared_memory() -> None:
    with pytest.raises(EmulationError, match=r"cp.async to byte 527 of the dynamic shared memory, which has 512"):
        reverse(wild())


def test_catches_missing_lanes() -> None:
    with pytest.raises(EmulationError, match=r"product_kernel.*the block hangs: \d+ threads wait in ldmatrix"):
        product(wild(), torch.bfloat16)


def test_catches_a_misaligned_access() -> None:
    with pytest.raises(EmulationError, match=r"double_kernel.*a misaligned access .*sample.cuh:\d+"):
        chain(wild())


def test_catches_a_change_of_the_split_between_dependent_launches() -> None:
    text = "  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout"
    undecided = f"  static int calls = 0;\n  if (calls++ % 2) return cudaSuccess;\n{text}"
    lib = planted("sample", "undecided", ROOT / "csrc" / "cuda" / "launch.cuh", (text, undecided))
    with pytest.raises(EmulationError, match=r"increment_kernel: launched as dependent with another split"):
        chain(lib)


def joined_sum(seed: int, mistake: int = 0) -> None:
    x, parts, counter, out = torch.arange(20.0).view(4, 5), nans(4).half(), torch.zeros(1, dtype=torch.int32), nans(1)
    library("sample").call(
        "joined_sum", x, parts, counter, out, *x.shape, mistake, writes=(parts, counter, out), seed=seed
    )
    assert (float(out), int(counter)) == (190, 0)


def shift(blocks: int, seed: int) -> None:
    x = torch.arange(64.0 * blocks + 1)
    library("sample").call("shift", x, blocks, writes=(x,), seed=seed)
    assert torch.equal(x[:-1], torch.arange(1, 64.0 * blocks + 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_a_ticket_orders(seed: int) -> None:
    """Of 16-bit numbers, where two blocks write into the same four bytes."""
    joined_sum(seed)
    shift(1, seed)


UNORDERED = "what another block (wrote|has read|updated), with no barrier and no ticket between: "
MISTAKES = {  # of sample.cuh, in its order
    "a ticket taken before the block's part is written": UNORDERED + r"byte \d of argument 1",
    "a ticket that orders nothing": UNORDERED + r"byte \d of argument [12]",
    "the first block joins": UNORDERED + r"byte \d of argument [12]",
    "every block puts the counter back": UNORDERED + "byte 0 of argument 2",
    "two blocks write one number of 16 bits": rf"writes {UNORDERED}byte [02] of argument 1",
    "barriers at two lines": r"barrier 0 by threads of one block at lines \d+ and \d+",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_catches_blocks_that_nothing_orders(mistake: str, seed: int) -> None:
    """Whatever the order in which they run."""
    with pytest.raises(EmulationError, match=rf"joined_sum_kernel.* {MISTAKES[mistake]}"):
        joined_sum(seed, 1 + list(MISTAKES).index(mistake))


@pytest.mark.parametrize("seed", SEEDS)
def test_catches_a_write_of_what_another_block_reads(seed: int) -> None:
    with pytest.raises(EmulationError, match=rf"shift_kernel.* {UNORDERED}byte \d+ of argument 0"):
        shift(2, seed)


def test_blocks_of_a_grid_take_turns() -> None:
    """Between two counts of a block others count, in some orders."""
    seen = set()
    for seed in range(40):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.full((6,), -1, dtype=torch.int32)
        library("sample").call("turns", counter, out, 6, writes=(counter, out), seed=seed)
        seen |= set(out.tolist())
        assert int(counter) == 12
    assert 0 in seen
    assert max(seen) > 1


SAMPLE = ROOT / "tests" / "cuda_emulation" / "sample.cuh"


def test_a_kernel_is_prepared_once_a_device() -> None:
    """Two attributes, each of two kernels on two devices, however often they are launched."""
    lib = planted("sample", "fresh", SAMPLE, ("// Small kernels", "// New kernels"))
    for arch, expected in ((90, 4), (90, 4), (80, 8), (90, 8), (80, 8)):
        chain(lib, arch=arch)
        assert lib.attributes_set == expected


def test_a_launch_that_takes_more_shared_memory_than_the_first_one() -> None:
    """The limit is the device's, not that of the launch which came first."""
    change = (".shared = 512", ".shared = static_cast<size_t>(n > 256 ? 100000 : 512)")
    lib = planted("sample", "growing", SAMPLE, change)
    for n in (256, 512, 256):
        x, out = torch.arange(float(n)), nans(n)
        lib.call("reverse", x, out, n, writes=(out,))
        assert torch.equal(out, x.flip(0))
