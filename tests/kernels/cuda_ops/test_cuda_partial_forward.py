"""`partial_forward` of csrc/cuda: the composition of the other ops, bit for bit, in any batch, slot and step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerskip_kernels.reference import partial_forward_ref

from ..common import DTYPES, TOLERANCES, assert_same_bits, double
from ..test_partial_forward import EPS, Case, Sizes, case, eager
from .cases import scattered
from .runners import Emulated, Ops

SIZES = [
    Sizes(num_layers=2),
    Sizes(num_layers=2, optional="bias", head_dim=24, num_kv_heads=3),
    Sizes(num_layers=2, optional="norm", num_heads=4, num_kv_heads=4, head_dim=40),
    Sizes(
        hidden_size=41, num_heads=3, num_kv_heads=1, head_dim=8, intermediate_size=9, num_layers=2, optional="bias norm"
    ),
]

# Deeper than the ring of weights in shared memory, in every dtype, so that the norm's part of it is filled again.
DEEP = Sizes(hidden_size=2304, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=40, num_layers=1)


def run(ops: Ops, one: Case, start: int, end: int, hidden: Tensor | None = None, *more: Any) -> Tensor:
    each = len(one.weights) // one.num_layers
    return ops.partial_forward(
        (one.hidden if hidden is None else hidden).contiguous(), one.weights[start * each : end * each], one.k_cache,
        one.v_cache, one.cos, one.sin, one.seq_lens, start, end, EPS, *more,
    )  # fmt: skip


def composition(ops: Ops, one: Case) -> Tensor:
    """All layers out of the other ops."""
    hidden, each, size = one.hidden, len(one.weights) // one.num_layers, one.k_cache.shape[-1]
    batch, rows, width = hidden.shape
    for layer in range(one.num_layers):
        weights = [w if w.numel() else None for w in one.weights[layer * each : (layer + 1) * each]]
        an, wq, wk, wv, wo, mn, gate, up, down, bq, bk, bv, nq, nk = [*weights, *[None] * (14 - each)]
        flat, caches = hidden.view(-1, width), (one.k_cache[layer], one.v_cache[layer])
        normed = ops.rms_norm(flat, an, EPS)
        q, k, v = (ops.linear(normed, w, b).view(batch, rows, -1, size) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
        q = q if nq is None else ops.rms_norm(q, nq, EPS)
        k = k if nk is None else ops.rms_norm(k, nk, EPS)
        q = ops.rope_kv_append(q, k, v, one.cos, one.sin, *caches, one.seq_lens)
        attended = ops.verify_attention(q, *caches, one.seq_lens).view(batch * rows, -1)
        flat = ops.linear(attended, wo, residual=flat)
        activated = ops.swiglu(ops.rms_norm(flat, mn, EPS), gate, up)
        hidden = ops.linear(activated, down, residual=flat).view(batch, rows, width)
    return hidden


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_is_the_composition_of_the_ops(ops: Ops, sizes: Sizes, dtype: torch.dtype) -> None:
    one = case(sizes, dtype, [5, 0, 57], 3)
    other = one.copy()
    assert_same_bits(run(ops, one, 0, 2), composition(ops, other))
    assert_same_bits((one.k_cache, one.v_cache), (other.k_cache, other.v_cache))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_deep_norm_is_that_of_the_op(ops: Ops, dtype: torch.dtype) -> None:
    one = case(DEEP, dtype, [5], 2)
    other = one.copy()
    assert_same_bits(run(ops, one, 0, 1), composition(ops, other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "batch"), [(replace(SIZES[1], num_layers=1), 8), (SIZES[3], 8), (DEEP, 4)])
def test_many_rows_have_the_bits_of_few(ops: Ops, sizes: Sizes, batch: int, dtype: torch.dtype) -> None:
    """Of 20 and 40 rows, which a block takes in one pass over its weights."""
    whole, depth = case(sizes, dtype, [5, 0, 9, 2, 7, 1, 3, 4][:batch], 5), sizes.num_layers
    parts = [whole.part(number, 0, 5) for number in range(batch)]
    hidden = run(ops, whole, 0, depth)
    for number, part in enumerate(parts):
        assert_same_bits(run(ops, part, 0, depth), hidden[number : number + 1], f"(sequence {number})")
        caches = whole.k_cache[:, number : number + 1], whole.v_cache[:, number : number + 1]
        assert_same_bits((part.k_cache, part.v_cache), caches, f"(sequence {number})")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_float64(ops: Ops, sizes: Sizes, dtype: torch.dtype) -> None:
    one = case(sizes, dtype, [31], 17)
    wide = [double(x) for x in (one.hidden, one.weights, one.k_cache, one.v_cache, one.cos, one.sin, one.seq_lens)]
    truth, same = partial_forward_ref(*wide, 0, 2, EPS), eager(one.copy()).double()
    # As for the CPU: over several layers the largest error is a matter of luck; the mean square is not.
    found, allowed = (float((x - truth).square().mean().sqrt()) for x in (run(ops, one, 0, 2).double(), same))
    assert found <= 1.1 * allowed + TOLERANCES[dtype] * float(truth.abs().max()), f"{found:.3e} against {allowed:.3e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [replace(sizes, num_layers=1) for sizes in SIZES[1:3]])
def test_rows_alone_and_later_in_a_draft(emulated: type[Emulated], sizes: Sizes, dtype: torch.dtype) -> None:
    """Row by row, each at its place past the old length, as a draft runs: the bits of all rows at once."""
    ops, whole, drafted = emulated(), case(sizes, dtype, [5, 0], 7), case(sizes, dtype, [5, 0], 7)
    expected = run(ops, whole, 0, 1)
    for m in range(7):
        assert_same_bits(
            run(ops, drafted, 0, 1, drafted.hidden[:, m : m + 1], None, m), expected[:, m : m + 1], f"(row {m})"
        )
    assert_same_bits((drafted.k_cache, drafted.v_cache), (whole.k_cache, whole.v_cache))
    alone = case(sizes, dtype, [5, 0], 7).part(1, 0, 7)
    assert_same_bits(run(ops, alone, 0, 1), expected[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_depth_is_cut_anywhere(ops: Ops, dtype: torch.dtype) -> None:
    one = case(Sizes(), dtype, [5], 3)
    other = one.copy()
    assert_same_bits(run(ops, other, 1, 3, run(ops, other, 0, 1)), run(ops, one, 0, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots(ops: Ops, dtype: torch.dtype) -> None:
    one = case(SIZES[0], dtype, [5, 0], 3)
    slots, other = torch.tensor([3, 1]), one.copy()
    other.k_cache, other.v_cache = (scattered(cache, slots, 4, 1) for cache in (one.k_cache, one.v_cache))
    assert_same_bits(run(ops, other, 0, 2, None, slots), run(ops, one, 0, 2))
    assert_same_bits(other.k_cache, scattered(one.k_cache, slots, 4, 1))
    assert_same_bits(other.v_cache, scattered(one.v_cache, slots, 4, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES[1:3])
def test_the_order_of_threads_does_not_matter(emulated: type[Emulated], sizes: Sizes, dtype: torch.dtype) -> None:
    """Nor whether a launch may start before the one ahead has ended."""
    expected = run(emulated(), case(sizes, dtype, [5], 2), 0, 2)
    for seed, arch in ((1, 80), (2, 90), (3, 90)):
        assert_same_bits(run(emulated(seed, arch), case(sizes, dtype, [5], 2), 0, 2), expected, f"with seed {seed}")
