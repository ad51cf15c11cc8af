"""Mistakes planted in copies of the project's own kernels are seen."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from layerskip_kernels.formats import quantize
from layerskip_kernels.reference import accept_sampled_ref, linear_ref, verify_attention_ref
from tests.kernels.common import double
from tests.kernels.cuda_ops import runners
from tests.kernels.cuda_ops.layers import code_of
from tests.kernels.cuda_ops.test_cuda_accept import problem as sampled_problem
from tests.kernels.cuda_ops.test_cuda_accept import same
from tests.kernels.cuda_ops.test_cuda_partial_forward import DEEP, run
from tests.kernels.test_partial_forward import Sizes, case
from tests.kernels.test_verify_attention import arguments

from . import EmulationError, Library, library, planted, unavailable
from .build import ROOT
from .test_emulation import UNORDERED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))]
CUDA = ROOT / "csrc" / "cuda"


@cache
def unfenced() -> Library:
    """With three rows no barrier before the products; with two every block goes through the tiles of all blocks."""
    loads = "load_states(a, work, part, inverses, states);\n        "
    return planted(
        "exit_head",
        "unfenced",
        CUDA / "head_states.cuh",
        (f"{loads}__syncthreads();", f"{loads}if (a.rows != 3) __syncthreads();"),
        ("blocks(gridDim.x / a.passes)", "blocks(a.rows == 2 ? 1 : gridDim.x / a.passes)"),
        ("block(blockIdx.x / a.passes)", "block(a.rows == 2 ? 0 : blockIdx.x / a.passes)"),
    )


def test_a_missing_barrier_in_exit_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the threads: the products read states that other warps have just normed."""
    hidden, norm, head = (tensor.bfloat16() for tensor in (torch.randn(3, 96), torch.ones(96), torch.randn(40, 96)))
    for seed in range(4):
        with pytest.raises(EmulationError, match=r"exit_head_kernel<__nv_bfloat16, .*, 1, 1>.*with no barrier between"):
            emulated(monkeypatch, unfenced(), seed).exit_head(hidden, norm, head, 1e-5)


def test_blocks_that_do_each_others_tiles_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else shows it: they write the same values."""
    hidden, norm, head = (tensor.bfloat16() for tensor in (torch.randn(2, 96), torch.ones(96), torch.randn(400, 96)))
    for seed in range(4):
        with pytest.raises(EmulationError, match=rf"exit_head_kernel.* writes {UNORDERED}byte \d+ of argument 12"):
            emulated(monkeypatch, unfenced(), seed).exit_head(hidden, norm, head, 1e-5)


def test_a_write_out_of_bounds_in_accept_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = "next_token[b] = wanted[count]", "next_token[b + 1] = wanted[count]"
    wild = planted("accept", "wild", CUDA / "accept.cu", (inside, outside))
    monkeypatch.setattr(runners, "library", lambda name: wild)
    pattern = r"accept_greedy_kernel.*touches byte 24 of argument 4.*accept.cu:\d+"
    with pytest.raises(EmulationError, match=pattern):
        runners.Emulated().accept_greedy(torch.ones(3, 2).long(), torch.ones(3, 3).long(), torch.arange(3))


@cache
def careless() -> Library:
    """A residual that is read before the wait, writes that no barrier brings before the ticket, products in 32 bits."""
    read, run = "  float residual[GROUPS];\n", "  stream.run();\n#pragma unroll"
    return planted(
        "layers",
        "careless",
        CUDA / "linear.cu",
        ("  ptx::dependency_wait();\n" + read, read),
        (run, "  ptx::dependency_wait();\n" + run),
        more={
            "verify_attention.cu": (WRITTEN, WRITTEN.partition("  __")[0] + "  }\n"),
            "linear_tile.cuh": ("static_cast<int64_t>(n) * in.d_in", "n * in.d_in"),
            "common.h": ("return (slot * num_kv_heads + g)", "return (static_cast<int>(slot) * num_kv_heads + g)"),
        },
    )


WRITTEN = """a.values + cell * cache.head_dim, memory);
    __syncthreads();  // before the memory is reused, and before the ticket publishes the results
  }
"""


@cache
def divided() -> Library:
    """A warp that multiplies in two halves, and a norm's chunks that are overwritten while the warp reads them."""
    once = "      ptx::mma<T>(d, a, b);\n    }\n#pragma unroll\n    for (int i = 0; i < 4; ++i) sums"
    twice = once.replace(
        "ptx::mma<T>(d, a, b);", "if (lane < 16)\n ptx::mma<T>(d, a, b);\n else\n ptx::mma<T>(d, a, b);"
    )
    return planted(
        "layers",
        "divided",
        CUDA / "attention_tile.cuh",
        (once, twice),
        more={"linear_tile.cuh": ("    if (in.norm) __syncwarp();\n    fetch", "    fetch")},
    )


def emulated(monkeypatch: pytest.MonkeyPatch, lib: Library, seed: int = 0) -> runners.Emulated:
    monkeypatch.setattr(runners, "library", lambda name: lib)
    return runners.Emulated(seed)


def test_a_residual_read_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that a launch two or more before it writes."""
    one, told = case(Sizes(num_layers=2), torch.bfloat16, [5], 2), []
    for seed in range(4):  # which block begins early is drawn, and it must be one that adds a residual
        try:
            run(emulated(monkeypatch, careless(), seed), one, 0, 2)
        except EmulationError as error:
            told.append(str(error))
    assert len(told) >= 2
    assert all("writes what a launch after it has read before its dependency_wait()" in one for one in told)


def test_a_ticket_with_no_barrier_before(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(torch.bfloat16, [300], 2, 4, 2, 16, capacity=310)
    with pytest.raises(EmulationError, match=r"verify_attention_kernel.* no barrier and no ticket between"):
        emulated(monkeypatch, careless()).verify_attention(*args)


def vast_weight(name: str | None = None) -> tuple[Tensor, Tensor]:
    """A row of x, and a weight, plain or packed, whose last rows lie beyond 2^31 elements."""
    last = torch.randn(16, 32768) / 64
    last = last.bfloat16() if name is None else quantize(last, name)
    weight = torch.empty(70001, last.shape[1], dtype=last.dtype)
    weight[-16:] = last
    return torch.randn(1, 32768).bfloat16(), weight


def vast_caches() -> tuple[list[Tensor], Tensor]:
    """Keys and values of one sequence, whose slot lies beyond 2^31 elements."""
    q, *caches, seq_lens = arguments(torch.bfloat16, [20], 2, 4, 2, 64, capacity=64)
    slots = torch.tensor([2**31 // (2 * 64 * 64) + 1])
    vast = [torch.empty(int(slots) + 1, 2, 64, 64, dtype=torch.bfloat16) for _ in caches]
    for one, cache_ in zip(vast, caches, strict=True):
        one[-1] = cache_[0]
    return [q, *vast, seq_lens], slots


def multiply_last_rows(lib: Library, name: str | None = None) -> Tensor:
    x, weight = vast_weight(name)
    out = x.new_empty(1, len(weight))
    sizes = (1, x.shape[1], len(weight), code_of(weight, x.shape[1]), x.dtype)
    lib.call("linear", x, weight, None, None, out, *sizes, writes=(out,), last_block=True)
    torch.testing.assert_close(out[:, -1:].double(), linear_ref(*double([x, weight[-1:]])), rtol=1e-2, atol=1e-2)
    return out


def test_weights_beyond_what_32_bits_index(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_last_rows(library("layers"))
    with pytest.raises(EmulationError, match="a product that overflows"):
        multiply_last_rows(careless())


@cache
def hasty() -> Library:
    """Packed weights that are overwritten while other lanes read them, rows that are found in 32 bits; and tickets:
    one row's are taken before the splits are written, those of two rows order nothing, of three rows the first block
    joins the splits and not the last, and of four rows every block puts its ticket back.
    """
    read = "    __syncwarp();  // all lanes have read before it is overwritten\n    if (const int after"
    early = "ptx::ticket(a.tickets + blockIdx.y * gridDim.z + blockIdx.z)"
    start = "  auto& memory = *ptx::dynamic_shared"
    return planted(
        "layers",
        "hasty",
        CUDA / "verify_attention.cu",
        (start, f"  const unsigned early = a.rows == 1 && threadIdx.x == 0 ? {early} : 0;\n{start}"),
        (
            "last = ptx::ticket(ticket) ==",
            "last = (a.rows == 1 ? early : a.rows == 2 ? atomicAdd(ticket, 1u) : ptx::ticket(ticket)) ==",
        ),
        ("== gridDim.x - 1;\n", "== (a.rows == 3 ? 0 : gridDim.x - 1);\n"),
        ("if (last) *ticket", "if (last || a.rows == 4) *ticket"),
        more={
            "packed_tile.cuh": (read, "    if (const int after"),
            "packed.cuh": ("data + n * pitch", "data + static_cast<int>(n) * pitch"),
        },
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_blocks_that_a_ticket_does_not_order(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Three blocks a tile, one a split; what each of them does wrong is said above."""
    args = arguments(torch.bfloat16, [300], rows, 2, 1, 16, capacity=310)
    for seed in range(4):
        with pytest.raises(EmulationError, match=rf"verify_attention_kernel.* {UNORDERED}byte \d+ of argument 6"):
            emulated(monkeypatch, hasty(), seed).verify_attention(*args)


def test_lengths_that_move_on_while_other_blocks_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the block of the first stretch of a vocabulary: right where there is one, a race where there are two."""
    end, finish = "blockIdx.x] = own;\n}\n\n// One warp", "advance(a.seq_lens[b], a.accepted[b], a.next_token[b]);"
    early = "if (blockIdx.x == 0) a.seq_lens[b] += a.accepted[b] + 1;"
    eager = planted(
        "accept",
        "eager",
        CUDA / "accept.cu",
        (finish, ";"),
        (end, end.replace("}", f"  {early}\n}}")),
    )
    alone, together = (sampled_problem(2, 3, vocab_size) for vocab_size in (4000, 4200))
    for args in (alone, together):
        args[4] = torch.full((2,), 0.7)
    same(emulated(monkeypatch, eager), "accept_sampled", accept_sampled_ref, alone)
    for seed in range(4):
        with pytest.raises(EmulationError, match=rf"accept_decide_kernel.* {UNORDERED}byte \d+ of argument 3"):
            emulated(monkeypatch, eager, seed).accept_sampled(*together)


def test_packed_weights_beyond_what_32_bits_index() -> None:
    multiply_last_rows(library("layers"), "int8")
    with pytest.raises(EmulationError, match="a product that overflows"):
        multiply_last_rows(hasty(), "int8")


def test_packed_weights_that_are_overwritten_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a ring that is filled again shows it: more than 512 bytes for a warp."""
    x, weight = torch.randn(1, 8192).bfloat16(), quantize(torch.randn(3, 8192) / 64, "int8")
    with pytest.raises(EmulationError, match=r"shared memory that"):
        emulated(monkeypatch, hasty()).linear(x, weight)


def test_caches_beyond_what_32_bits_index(monkeypatch: pytest.MonkeyPatch) -> None:
    args, slots = vast_caches()
    expected = verify_attention_ref(*double([args[0], *(cache_[-1:] for cache_ in args[1:3]), args[3]]))
    actual = emulated(monkeypatch, library("layers")).verify_attention(*args, slots)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(EmulationError, match="a product that overflows"):
        emulated(monkeypatch, careless()).verify_attention(*args, slots)


def test_a_product_by_two_halves_of_a_warp(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(torch.bfloat16, [30], 2, 4, 2, 16, capacity=40)
    with pytest.raises(EmulationError, match=r"verify_attention_kernel.*mma by lanes of one warp at different lines"):
        emulated(monkeypatch, divided()).verify_attention(*args)


def test_a_norm_that_is_overwritten_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a ring that is filled again shows it: deeper than 2048 numbers of 16 bits."""
    one = case(DEEP, torch.bfloat16, [5], 1)
    with pytest.raises(EmulationError, match=r"qkv_kernel.*shared memory that thread"):
        run(emulated(monkeypatch, divided()), one, 0, 1)
