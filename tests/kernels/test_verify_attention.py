"""`verify_attention`: causal, grouped-query, ragged; what lies past a sequence's length is never read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.reference import verify_attention_ref

from .common import (
    DTYPES,
    Inputs,
    assert_as_good_as,
    assert_same_bits,
    assert_same_result,
    assert_threads_agree,
    double,
    needles,
    strided,
)

HEADS = [(1, 1), (4, 2), (6, 2), (8, 1)]  # 1, 2, 3 and 8 query heads a key/value head
SIZES = [8, 16, 40, 64, 72, 128, 256]


def arguments(
    dtype: torch.dtype, lengths: list[int], rows: int, heads: int, groups: int, size: int, capacity: int
) -> list[Tensor]:
    """Keys and values up to each sequence's last row; NaN past it."""
    make, batch = Inputs(dtype), len(lengths)
    caches = [make.normal(batch, groups, capacity, size) for _ in range(2)]
    for b, length in enumerate(lengths):
        for cache in caches:
            cache[b, :, length + rows :] = float("nan")
    return [make.normal(batch, rows, heads, size), *caches, torch.tensor(lengths, dtype=torch.int64)]


def eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
    """torch's attention in the dtype of q, one sequence at a time."""
    rows, out = q.shape[1], []
    for one, keys, values, length in zip(q, k_cache, v_cache, seq_lens.tolist(), strict=True):
        seen = torch.ones(rows, length + rows, dtype=torch.bool).tril(length)
        keys, values = keys[None, :, : length + rows], values[None, :, : length + rows]
        attended = F.scaled_dot_product_attention(one.transpose(0, 1)[None], keys, values, seen, enable_gqa=True)
        out.append(attended[0].transpose(0, 1))
    return torch.stack(out)


def check(args: list[Tensor], dtype: torch.dtype) -> None:
    assert_as_good_as(lk.verify_attention(*args), eager(*args), verify_attention_ref(*double(args)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", HEADS)
def test_float64(path: str, heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    check(arguments(dtype, [0, 17, 41 - 5], 5, *heads, size, capacity=41), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[700], [1500], [3, 1500, 255, 256, 0], [2080, 4200]])
def test_long_contexts(path: str, lengths: list[int], dtype: torch.dtype) -> None:
    """Across the splits of a context, and sequences of very different lengths beside each other."""
    check(arguments(dtype, lengths, 6, 6, 2, 64, capacity=max(lengths) + 10), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [64, 256, 512])
def test_every_split_is_seen(path: str, split: int, dtype: torch.dtype) -> None:
    """The value of one position of very many, whatever the size of a split."""
    args, expected = needles(dtype, split)
    assert_same_bits(lk.verify_attention(*args), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_splits_than_are_combined_at_once(path: str, dtype: torch.dtype) -> None:
    """Thirty-three splits of 256 positions, seventeen, and one short of it."""
    check(arguments(dtype, [8460, 4350, 4095], 2, 2, 1, 8, capacity=8462), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [62, 63, 64, 255, 256, 257, 511])
def test_edges_of_tiles_and_splits(path: str, length: int, dtype: torch.dtype) -> None:
    check(arguments(dtype, [length], 4, 6, 2, 40, capacity=515), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(path: str, dtype: torch.dtype) -> None:
    for rows in (*range(1, 18), 50):
        check(arguments(dtype, [250, 0], rows, 3, 1, 40, capacity=300), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_token_sees_itself_alone(path: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, [0], 1, 4, 2, 16, capacity=9)
    assert_same_bits(lk.verify_attention(*args)[0, 0], args[2][0, :, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(path: str, dtype: torch.dtype) -> None:
    """Scores of several hundred: a softmax that forgets the maximum overflows, one split's maximum is not another's."""
    q, k_cache, v_cache, seq_lens = arguments(dtype, [600], 3, 2, 1, 64, capacity=603)
    check([q * 16, k_cache * 4, v_cache, seq_lens], dtype)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(path: str, shape: tuple[int, int]) -> None:
    batch, rows = shape
    args = arguments(torch.float32, [3] * batch, rows, 4, 2, 16, capacity=3 + rows)
    assert lk.verify_attention(*args).shape == (batch, rows, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_garbage_past_the_length_changes_nothing(path: str, dtype: torch.dtype) -> None:
    q, k_cache, v_cache, seq_lens = arguments(dtype, [0, 300, 31], 4, 6, 2, 40, capacity=310)
    garbage = k_cache.isnan()
    expected = lk.verify_attention(q, k_cache, v_cache, seq_lens)
    assert bool(garbage.any() and expected.isfinite().all())
    for value in (0.0, 1e4, float("inf"), float("-inf")):
        caches = [cache.masked_fill(garbage, value) for cache in (k_cache, v_cache)]
        assert_same_bits(lk.verify_attention(q, *caches, seq_lens), expected, f"with {value} past the length")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("heads", [(6, 2, 40), (2, 1, 64)])
def test_a_row_that_is_not_finite_harms_no_earlier_one(
    path: str, heads: tuple[int, int, int], value: float, dtype: torch.dtype
) -> None:
    """A draft that overflowed is rejected; the rows before it must be as if it were not there."""
    check_later_rows(lk.verify_attention, arguments(dtype, [0, 61, 126, 253, 300], 6, *heads, capacity=310), value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_harms_none_of_many_rows(path: str, dtype: torch.dtype) -> None:
    q, k_cache, v_cache, seq_lens = arguments(dtype, [240], 23, 4, 2, 64, capacity=264)
    expected = lk.verify_attention(q, k_cache, v_cache, seq_lens)
    for first in (8, 17, 22):
        broken = v_cache.clone()
        broken[:, :, 240 + first : 263] = float("nan")
        assert_same_bits(lk.verify_attention(q, k_cache, broken, seq_lens)[:, :first], expected[:, :first], f"{first}")


def check_later_rows(attend: Callable[..., Tensor], args: list[Tensor], value: float) -> None:
    """Of six rows a sequence, the last ones hold ``value``: the rows before keep their bits, they become not finite."""
    q, k_cache, v_cache, seq_lens = args
    expected = attend(*args)
    for first in (1, 4, 5):
        broken = [cache.clone() for cache in (k_cache, v_cache)]
        for b, length in enumerate(seq_lens.tolist()):
            for cache in broken:
                cache[b, :, length + first : length + 6] = value
        for caches in ((k_cache, broken[1]), broken):
            out = attend(q, *caches, seq_lens)
            assert_same_bits(out[:, :first], expected[:, :first], f"from row {first} on {value}")
            assert not out[:, first:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_queries(path: str, dtype: torch.dtype) -> None:
    q, *rest = arguments(dtype, [2, 9], 3, 6, 2, 40, capacity=16)
    expected = lk.verify_attention(q, *rest)
    for other in strided(q):
        assert_same_result(path, lk.verify_attention(other, *rest), expected)


def test_inputs_are_unchanged(path: str) -> None:
    args = arguments(torch.float32, [2, 9], 3, 6, 2, 40, capacity=16)
    copies = [arg.clone() for arg in args]
    lk.verify_attention(*args)
    assert_same_bits(args, copies)


@pytest.mark.parametrize("length", [-1, 14])
def test_positions_outside_the_cache(path: str, length: int) -> None:
    args = arguments(torch.float32, [0, 9], 3, 4, 2, 16, capacity=16)
    args[3][1] = length
    with pytest.raises((ValueError, RuntimeError), match=r"cache.*16"):
        lk.verify_attention(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "size"), [(9, (6, 2), 64), (9, (8, 1), 40), (9, (3, 3), 128), (23, (4, 2), 64), (40, (3, 1), 72)]
)
def test_rows_do_not_depend_on_each_other(
    isa: str, rows: int, heads: tuple[int, int], size: int, dtype: torch.dtype
) -> None:
    """A row alone, whose sequence then is as long as the row's position, and a sequence without the others."""
    q, k_cache, v_cache, seq_lens = arguments(dtype, [0, 509, 250, 31, 60], rows, *heads, size, capacity=560)
    whole = lk.verify_attention(q, k_cache, v_cache, seq_lens)
    for b in range(5):
        one = [tensor[b : b + 1] for tensor in (k_cache, v_cache, seq_lens)]
        assert_same_bits(lk.verify_attention(q[b : b + 1], *one), whole[b : b + 1], f"(sequence {b})")
        for m in range(rows):
            alone = lk.verify_attention(q[b : b + 1, m : m + 1], *one[:2], one[2] + m)
            assert_same_bits(alone, whole[b : b + 1, m : m + 1], f"(row {m} of sequence {b})")


@pytest.mark.parametrize("dtype", DTYPES)
def test_capacity_does_not_matter(isa: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, [300], 3, 6, 2, 64, capacity=303)
    larger = [F.pad(cache, (0, 0, 0, 1000), value=float("nan")) for cache in args[1:3]]
    assert_same_bits(lk.verify_attention(args[0], *larger, args[3]), lk.verify_attention(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 33])
def test_threads_agree(isa: str, rows: int, dtype: torch.dtype) -> None:
    args = arguments(dtype, [700, 0, 300], rows, 6, 2, 64, capacity=740)
    assert_threads_agree(lambda: lk.verify_attention(*args))


def test_splits_are_joined_when_all_are_there(isa: str) -> None:
    """Of three splits one of two threads has two; the other is done before, and finds those of another call."""
    args = arguments(torch.float32, [3 * 256 - 15], 15, 4, 1, 128, capacity=768)
    before = [*args[:2], -args[2], args[3]]
    assert_threads_agree(lambda: (lk.verify_attention(*before), lk.verify_attention(*args)))
