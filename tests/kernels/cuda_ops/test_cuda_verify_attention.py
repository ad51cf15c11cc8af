"""`verify_attention` of csrc/cuda."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels.reference import verify_attention_ref

from ..common import DTYPES, assert_as_good_as, assert_same_bits, double, needles
from ..test_verify_attention import arguments, check_later_rows, eager
from .cases import misaligned, scattered
from .runners import Emulated, Ops

NARROW = (torch.bfloat16, torch.float16)
# H, G, C: every number of query heads a key/value head beside every kind of head size
HEADS = [(1, 1, 8), (4, 2, 64), (6, 2, 40), (8, 1, 72), (3, 3, 128), (2, 1, 256)]


def check(ops: Ops, args: list[Tensor], dtype: torch.dtype) -> None:
    actual = ops.verify_attention(*args)
    truth, own = verify_attention_ref(*double(args)), eager(*args)
    assert_as_good_as(actual, own, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), HEADS)
def test_float64(ops: Ops, heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    check(ops, arguments(dtype, [0, 17, 36], 5, heads, groups, size, capacity=41), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_across_splits(ops: Ops, dtype: torch.dtype) -> None:
    """Lengths on both sides of a split's end, which the rows of one step straddle."""
    check(ops, arguments(dtype, [3, 125, 128, 255, 390], 5, 6, 2, 16, capacity=400), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_split_is_seen(ops: Ops, dtype: torch.dtype) -> None:
    args, expected = needles(dtype, 128)
    assert_same_bits(ops.verify_attention(*args), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(ops: Ops, dtype: torch.dtype) -> None:
    q, k_cache, v_cache, seq_lens = arguments(dtype, [200], 3, 2, 1, 64, capacity=203)
    check(ops, [q * 16, k_cache * 4, v_cache, seq_lens], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_harms_no_earlier_one(ops: Ops, value: float, dtype: torch.dtype) -> None:
    """A draft that overflowed is rejected; the rows before it must be as if it were not there."""
    check_later_rows(ops.verify_attention, arguments(dtype, [0, 61, 126, 253], 6, 6, 2, 40, capacity=260), value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(ops: Ops, dtype: torch.dtype) -> None:
    """A row alone, whose sequence then is as long as the row's position."""
    q, k_cache, v_cache, seq_lens = arguments(dtype, [0, 125], 7, 8, 2, 40, capacity=140)
    whole = ops.verify_attention(q, k_cache, v_cache, seq_lens)
    for b in range(2):
        caches = [cache[b : b + 1] for cache in (k_cache, v_cache)]
        for m in range(7):
            alone = ops.verify_attention(q[b : b + 1, m : m + 1].contiguous(), *caches, seq_lens[b : b + 1] + m)
            assert_same_bits(alone, whole[b : b + 1, m : m + 1], f"(row {m} of sequence {b})")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_several_launches(emulated: type[Emulated], dtype: torch.dtype) -> None:
    """As the scratch of long prompts demands: here two rows at once."""
    args, two_rows = arguments(dtype, [0, 125], 5, 4, 2, 24, capacity=140), 2 * 2 * 4 * 2 * (24 + 2) * 4
    assert_same_bits(emulated().verify_attention(*args, limit=two_rows), emulated().verify_attention(*args))


@pytest.mark.parametrize(
    ("sizes", "at_once"),
    [
        ((8, 5, 32, 8, 64, 2**17), 5),  # Llama-3.2-1B, eight slots of 128 K: a launch for all drafts of a round
        ((1, 300, 32, 8, 64, 2**13), 124),  # a prompt: 64 MiB hold 124 rows
        ((1, 5, 4, 4, 8, 64), 5),
    ],
)
def test_a_round_reads_the_cache_once(emulated: type[Emulated], sizes: tuple[int, ...], at_once: int) -> None:
    """The scratch may grow with the cache, so that all rows of a round go through it in one launch."""
    found = torch.zeros(1, dtype=torch.int64)
    emulated().call("layers", "rows_at_once", found, *sizes, writes=[found])
    assert int(found) == at_once


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_and_capacity_do_not_matter(ops: Ops, dtype: torch.dtype) -> None:
    args = arguments(dtype, [140, 0], 3, 4, 2, 24, capacity=143)
    expected = ops.verify_attention(*args)
    slots = torch.tensor([2, 0])
    caches = [scattered(F.pad(cache, (0, 0, 0, 200), value=float("nan")), slots, 4, 0) for cache in args[1:3]]
    assert_same_bits(ops.verify_attention(args[0], *caches, args[3], slots), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_garbage_past_the_length_changes_nothing(ops: Ops, dtype: torch.dtype) -> None:
    q, k_cache, v_cache, seq_lens = arguments(dtype, [0, 130], 3, 4, 2, 24, capacity=150)
    expected = ops.verify_attention(q, k_cache, v_cache, seq_lens)
    assert bool(expected.isfinite().all())
    for value in (0.0, float("inf")):
        caches = [cache.masked_fill(k_cache.isnan(), value) for cache in (k_cache, v_cache)]
        assert_same_bits(ops.verify_attention(q, *caches, seq_lens), expected, f"with {value} past the length")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_and_alignment_do_not_matter(emulated: type[Emulated], dtype: torch.dtype) -> None:
    q, k_cache, v_cache, seq_lens = arguments(dtype, [130], 5, 4, 1, 24, capacity=150)
    expected = emulated().verify_attention(q, k_cache, v_cache, seq_lens)
    for seed, arch in ((1, 80), (2, 90)):
        other = emulated(seed, arch).verify_attention(q, misaligned(k_cache), v_cache, seq_lens)
        assert_same_bits(other, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_take_several_splits(ops: Ops, dtype: torch.dtype) -> None:
    """With 256 sequences there are two blocks a sequence for three splits; all but two sequences have no row."""
    q, k_cache, v_cache, seq_lens = arguments(dtype, [-1] * 256, 1, 1, 1, 8, capacity=300)
    two = arguments(dtype, [299, 150], 1, 1, 1, 8, capacity=300)
    for full, part in zip((q, k_cache, v_cache, seq_lens), two, strict=True):
        full[[3, 200]] = part
    out = ops.verify_attention(q, k_cache, v_cache, seq_lens)
    assert_same_bits(out[[3, 200]], ops.verify_attention(*two))
    out[[3, 200]] = float("nan")
    assert bool(out.isnan().all())


@pytest.mark.parametrize("slots", [None, [0, -1]])
@pytest.mark.parametrize("length", [-(2**63), -2, -1, 14, 2**31, 2**32 + 5, 2**63 - 1])
def test_outside_the_cache(ops: Ops, length: int, slots: list[int] | None) -> None:
    """Rows outside the cache come out as NaN; the others are what they would be."""
    args = arguments(torch.float32, [0, 9], 3, 4, 2, 16, capacity=16)
    caches = [cache.nan_to_num(0.5) for cache in args[1:3]]
    args[3][1] = length
    out = ops.verify_attention(args[0], *caches, args[3], None if slots is None else torch.tensor(slots))
    inside = [length >= 0 and length + m < 16 and slots is None for m in range(3)]
    assert out[1].isnan().flatten(1).all(1).tolist() == [not one for one in inside]
    assert bool(out[0].isfinite().all())
    for m in range(3):
        if inside[m]:
            one = [cache[1:] for cache in caches]
            alone = ops.verify_attention(args[0][1:, m : m + 1].contiguous(), *one, args[3][1:] + m)
            assert_same_bits(alone[0, 0], out[1, m])
