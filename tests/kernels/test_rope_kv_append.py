"""`rope_kv_append`: rotated queries out, rotated keys and values into the cache, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.reference import rope_kv_append_ref

from .common import (
    DTYPES,
    Inputs,
    assert_as_good_as,
    assert_same_bits,
    assert_same_result,
    assert_threads_agree,
    double,
    rope_tables,
    strided,
)

CAPACITY = 24
HEADS = [(1, 1), (2, 1), (6, 2), (3, 3), (8, 1)]
SIZES = [8, 16, 40, 64, 72, 128, 256]


def arguments(
    dtype: torch.dtype, lengths: list[int], rows: int, heads: int, groups: int, size: int, capacity: int = CAPACITY
) -> list[Tensor]:
    make, batch = Inputs(dtype), len(lengths)
    q, k, v = (make.normal(batch, rows, count, size) for count in (heads, groups, groups))
    cache = [torch.full((batch, groups, capacity, size), float("nan"), dtype=dtype) for _ in range(2)]
    return [q, k, v, *rope_tables(capacity + 3, size), *cache, torch.tensor(lengths, dtype=torch.int64)]


def rotate_in_dtype(x: Tensor, cos: Tensor, sin: Tensor, seq_lens: Tensor) -> Tensor:
    """The usual torch code: everything in the dtype of x."""
    positions = seq_lens[:, None] + torch.arange(x.shape[1])
    cos, sin = (torch.cat([one, one], -1)[positions][:, :, None].to(x.dtype) for one in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def written(cache: Tensor, seq_lens: Tensor, rows: int) -> Tensor:
    """What lies at the step's positions, [B, M, G, C]."""
    return torch.stack([one[:, at : at + rows].transpose(0, 1) for one, at in zip(cache, seq_lens, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", HEADS)
def test_float64(path: str, heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    lengths, rows = [0, 7, CAPACITY - 5], 5
    args = arguments(dtype, lengths, rows, *heads, size)
    q, k, v, cos, sin, k_cache, v_cache, seq_lens = args
    wide = double(args)
    truth = rope_kv_append_ref(*wide)
    actual = lk.rope_kv_append(*args)
    assert_as_good_as(actual, rotate_in_dtype(q, cos, sin, seq_lens), truth, dtype)
    keys, true_keys = written(k_cache, seq_lens, rows), written(wide[5], seq_lens, rows)
    assert_as_good_as(keys, rotate_in_dtype(k, cos, sin, seq_lens), true_keys, dtype)
    assert_same_bits(written(v_cache, seq_lens, rows), v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_new_positions_are_written(path: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, [0, 7, CAPACITY - 5], 5, 6, 2, 40)
    inputs, caches, seq_lens = args[:5], args[5:7], args[7]
    for cache in caches:
        cache.copy_(torch.arange(cache.numel()).view(cache.shape) % 97)
    before, kept = [cache.clone() for cache in caches], [one.clone() for one in (*inputs, seq_lens)]
    lk.rope_kv_append(*args)
    assert_same_bits((*inputs, seq_lens), kept)
    for b, length in enumerate(seq_lens.tolist()):
        for cache, old in zip(caches, before, strict=True):
            cache[b, :, length : length + 5] = old[b, :, length : length + 5]
    assert_same_bits(caches, before)


def test_known_rotation(path: str) -> None:
    """At position 1, pair (i, i + C/2) turns by the angle in row 1 of the tables."""
    angles = torch.tensor([[0.0] * 4, [0.1, 0.2, 0.3, 0.4], [9.0] * 4])
    q = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
    cache = torch.zeros(1, 1, 2, 8)
    out = lk.rope_kv_append(q, q, q, angles.cos(), angles.sin(), cache, cache.clone(), torch.tensor([1]))
    turned = torch.view_as_real(torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones(4), angles[1]))
    expected = torch.cat([turned[..., 0], turned[..., 1]], -1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(cache[0, 0], torch.stack([torch.zeros(8), expected.flatten()]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(path: str, shape: tuple[int, int]) -> None:
    batch, rows = shape
    args = arguments(torch.float32, [3] * batch, rows, 4, 2, 16)
    assert lk.rope_kv_append(*args).shape == (batch, rows, 4, 16)
    assert bool(args[5].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_activations(path: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, [2, 9], 3, 6, 2, 40)
    caches = [one.clone() for one in args[5:7]]
    expected = lk.rope_kv_append(*args)
    for q, k, v in zip(*(strided(one) for one in args[:3]), strict=True):
        again = [one.clone() for one in caches]
        assert_same_result(path, lk.rope_kv_append(q, k, v, *args[3:5], *again, args[7]), expected)
        assert_same_bits(again, args[5:7])


@pytest.mark.parametrize("length", [-1, CAPACITY - 2])
def test_positions_outside_the_cache(path: str, length: int) -> None:
    args = arguments(torch.float32, [0, length], 3, 4, 2, 16)
    with pytest.raises((ValueError, RuntimeError), match=f"cache.*{CAPACITY}"):
        lk.rope_kv_append(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(isa: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, [0, 5, 11], 9, 6, 2, 72)
    q, k, v, cos, sin, *caches, seq_lens = args
    empty = [one.clone() for one in caches]
    whole = lk.rope_kv_append(*args)
    alone = [one.clone() for one in empty]
    for b in range(3):
        for m in range(9):
            row = [one[b : b + 1, m : m + 1] for one in (q, k, v)]
            cache = [one[b : b + 1] for one in alone]
            out = lk.rope_kv_append(*row, cos, sin, *cache, seq_lens[b : b + 1] + m)
            assert_same_bits(out, whole[b : b + 1, m : m + 1], f"(row {m} of sequence {b})")
    assert_same_bits(alone, caches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_agree(isa: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, [0, 5, 11], 9, 6, 2, 72)
    assert_threads_agree(lambda: (lk.rope_kv_append(*args), args[5].clone(), args[6].clone()))
