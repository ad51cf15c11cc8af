"""`rope_kv_append` of csrc/cuda."""

from __future__ import annotations

import pytest
import torch

from layerskip_kernels.reference import rope_kv_append_ref

from ..common import DTYPES, assert_as_good_as, assert_same_bits, double
from ..test_rope_kv_append import arguments, rotate_in_dtype, written
from .cases import scattered
from .runners import Ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(1, 1, 8), (6, 2, 40), (3, 3, 72), (2, 1, 256)])
def test_float64(ops: Ops, heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    lengths, rows = [0, 7, 19], 5
    args = arguments(dtype, lengths, rows, heads, groups, size)
    q, k, v, cos, sin, k_cache, v_cache, seq_lens = args
    wide = double(args)
    truth = rope_kv_append_ref(*wide)
    actual = ops.rope_kv_append(*args)
    assert_as_good_as(actual, rotate_in_dtype(q, cos, sin, seq_lens), truth, dtype)
    keys, true_keys = written(k_cache, seq_lens, rows), written(wide[5], seq_lens, rows)
    assert_as_good_as(keys, rotate_in_dtype(k, cos, sin, seq_lens), true_keys, dtype)
    assert_same_bits(written(v_cache, seq_lens, rows), v)
    assert int((~k_cache.isnan()).sum()) == int((~v_cache.isnan()).sum()) == k.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots(ops: Ops, dtype: torch.dtype) -> None:
    args = arguments(dtype, [3, 0], 2, 4, 2, 16)
    slots = torch.tensor([4, 1])
    caches = [scattered(cache, slots, 5, 0) for cache in args[5:7]]
    actual = ops.rope_kv_append(*args[:5], *caches, args[7], slots)
    assert_same_bits(actual, ops.rope_kv_append(*args))
    for cache, plain in zip(caches, args[5:7], strict=True):
        assert_same_bits(cache, scattered(plain, slots, 5, 0))


@pytest.mark.parametrize("slots", [None, [0, 2]])
@pytest.mark.parametrize("length", [-(2**63), -2, -1, 23, 2**31, 2**32 + 5, 2**63 - 1])
def test_outside_the_cache(ops: Ops, length: int, slots: list[int] | None) -> None:
    """Rows of a negative length, past the last position, or of a slot that the cache has not: NaN, nothing written."""
    args = arguments(torch.float32, [1, length], 3, 4, 2, 16)
    out = ops.rope_kv_append(*args, None if slots is None else torch.tensor(slots))
    inside = torch.tensor([length >= 0 and length + m < 24 and slots is None for m in range(3)])
    assert not bool(out[0].isnan().any())
    assert torch.equal(out[1].isnan().all(-1).all(-1), ~inside)
    assert torch.equal(out[1].isnan().any(-1).any(-1), ~inside)
    for cache in args[5:7]:
        assert int((~cache.isnan()).sum()) == (3 + int(inside.sum())) * 2 * 16
