"""`partial_forward`: the composition of the other ops, bit for bit; depth can be cut anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.reference import partial_forward_ref

from .common import (
    DTYPES,
    TOLERANCES,
    Inputs,
    assert_same_bits,
    assert_threads_agree,
    double,
    rope_tables,
    run,
)

EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """D, H, G, C, F and L of a small model, and which optional tensors its layers have."""

    hidden_size: int = 48
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 70
    num_layers: int = 3
    optional: str = ""  # of "bias", "norm"


SIZES = [
    Sizes(),
    Sizes(optional="bias"),
    Sizes(optional="norm", num_heads=4, num_kv_heads=4, head_dim=40),
    Sizes(hidden_size=41, num_heads=3, num_kv_heads=1, head_dim=8, intermediate_size=9, optional="bias norm"),
    Sizes(hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=200, num_layers=2),
]


def layer(make: Inputs, sizes: Sizes) -> list[Tensor]:
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    hidden_size, intermediate_size = sizes.hidden_size, sizes.intermediate_size
    plain = [
        make.norm(hidden_size), make.weight(queries, hidden_size), make.weight(keys, hidden_size),
        make.weight(keys, hidden_size), make.weight(hidden_size, queries), make.norm(hidden_size),
        make.weight(intermediate_size, hidden_size), make.weight(intermediate_size, hidden_size),
        make.weight(hidden_size, intermediate_size),
    ]  # fmt: skip
    if not sizes.optional:
        return plain
    none = torch.empty(0, dtype=make.dtype)
    biases = [make.normal(count) for count in (queries, keys, keys)] if "bias" in sizes.optional else [none] * 3
    norms = [make.norm(sizes.head_dim), make.norm(sizes.head_dim)] if "norm" in sizes.optional else [none] * 2
    return [*plain, *biases, *norms]


@dataclass
class Case:
    hidden: Tensor
    weights: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor
    sin: Tensor
    seq_lens: Tensor

    def run(self, start: int, end: int, hidden: Tensor | None = None) -> Tensor:
        each = len(self.weights) // self.k_cache.shape[0]
        return run(
            "partial_forward", self.hidden if hidden is None else hidden, self.weights[start * each : end * each],
            self.k_cache, self.v_cache, self.cos, self.sin, self.seq_lens, start, end, EPS,
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        return self.k_cache.shape[0]

    def copy(self) -> Case:
        return Case(self.hidden, self.weights, self.k_cache.clone(), self.v_cache.clone(), self.cos, self.sin,
                    self.seq_lens)  # fmt: skip

    def part(self, b: int, m: int, count: int) -> Case:
        """Rows m … m + count - 1 of sequence b, on its own cache."""
        hidden, caches = self.hidden[b : b + 1, m : m + count], (self.k_cache, self.v_cache)
        own = [cache[:, b : b + 1].contiguous() for cache in caches]
        return Case(hidden, self.weights, *own, self.cos, self.sin, self.seq_lens[b : b + 1] + m)


def case(sizes: Sizes, dtype: torch.dtype, lengths: list[int], rows: int, capacity: int = 64) -> Case:
    """Caches hold a past up to each length and NaN beyond."""
    make, batch = Inputs(dtype), len(lengths)
    caches = [make.normal(sizes.num_layers, batch, sizes.num_kv_heads, capacity, sizes.head_dim) for _ in range(2)]
    for b, length in enumerate(lengths):
        for cache in caches:
            cache[:, b, :, length:] = float("nan")
    weights = [tensor for _ in range(sizes.num_layers) for tensor in layer(make, sizes)]
    hidden = make.normal(batch, rows, sizes.hidden_size)
    return Case(
        hidden, weights, *caches, *rope_tables(capacity, sizes.head_dim), torch.tensor(lengths, dtype=torch.int64)
    )


def eager(one: Case) -> Tensor:
    """The usual torch code, every step in the dtype of the model."""
    hidden, each = one.hidden, len(one.weights) // one.num_layers
    batch, rows, width = hidden.shape
    size = one.k_cache.shape[-1]
    positions = one.seq_lens[:, None] + torch.arange(rows)
    cos, sin = (torch.cat([t, t], -1)[positions][:, :, None].to(hidden.dtype) for t in (one.cos, one.sin))
    for index in range(one.num_layers):
        weights = [w if w.numel() else None for w in one.weights[index * each : (index + 1) * each]]
        an, wq, wk, wv, wo, mn, gate, up, down, bq, bk, bv, nq, nk = [*weights, *[None] * (14 - each)]
        normed = F.rms_norm(hidden, (width,), an, EPS)
        q, k, v = (F.linear(normed, w, b).view(batch, rows, -1, size) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
        q = q if nq is None else F.rms_norm(q, (size,), nq, EPS)
        k = k if nk is None else F.rms_norm(k, (size,), nk, EPS)
        q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
        attended = torch.stack([
            attend(q[b], k[b], v[b], one.k_cache[index, b], one.v_cache[index, b], int(one.seq_lens[b]))
            for b in range(batch)
        ])  # fmt: skip
        hidden = hidden + F.linear(attended.reshape(batch, rows, -1), wo)
        normed = F.rms_norm(hidden, (width,), mn, EPS)
        hidden = hidden + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
    return hidden


def attend(q: Tensor, k: Tensor, v: Tensor, k_past: Tensor, v_past: Tensor, length: int) -> Tensor:
    keys, values = (
        torch.cat([k_past[:, :length], k.transpose(0, 1)], 1),
        torch.cat([v_past[:, :length], v.transpose(0, 1)], 1),
    )
    seen = torch.ones(q.shape[0], keys.shape[1], dtype=torch.bool).tril(length)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys[None], values[None], seen, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("lengths", "rows"), [([0], 1), ([5, 0, 57], 7), ([31], 17)])
def test_float64(path: str, sizes: Sizes, lengths: list[int], rows: int, dtype: torch.dtype) -> None:
    one = case(sizes, dtype, lengths, rows)
    truth = partial_forward_ref(
        double(one.hidden), double(one.weights), double(one.k_cache), double(one.v_cache), one.cos, one.sin,
        one.seq_lens, 0, one.num_layers, EPS,
    )  # fmt: skip
    out, same = one.run(0, one.num_layers).double(), eager(one).double()
    # Over several layers the largest error is a matter of luck; the mean square is not, and ours rounds less often.
    found, allowed = (float((x - truth).square().mean().sqrt()) for x in (out, same))
    assert found <= 1.1 * allowed + TOLERANCES[dtype] * float(truth.abs().max()), f"{found:.3e} against {allowed:.3e}"


def composition(one: Case, start: int, end: int) -> Tensor:
    """The ops that the docstring names, called one by one."""
    batch, rows, width = one.hidden.shape
    each, size, flat = len(one.weights) // one.num_layers, one.k_cache.shape[-1], one.hidden.reshape(-1, width)
    for index in range(start, end):
        weights = [w if w.numel() else None for w in one.weights[index * each : (index + 1) * each]]
        an, wq, wk, wv, wo, mn, gate, up, down, bq, bk, bv, nq, nk = [*weights, *[None] * (14 - each)]
        normed = lk.rms_norm(flat, an, EPS)
        q, k, v = (lk.linear(normed, w, b).view(batch, rows, -1, size) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
        q = q if nq is None else lk.rms_norm(q, nq, EPS)
        k = k if nk is None else lk.rms_norm(k, nk, EPS)
        caches = one.k_cache[index], one.v_cache[index]
        q = lk.rope_kv_append(q, k, v, one.cos, one.sin, *caches, one.seq_lens)
        attended = lk.verify_attention(q, *caches, one.seq_lens).reshape(batch * rows, -1)
        flat = lk.linear(attended, wo, residual=flat)
        flat = lk.linear(lk.swiglu(lk.rms_norm(flat, mn, EPS), gate, up), down, residual=flat)
    return flat.view(batch, rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("lengths", "rows"), [([5, 0, 57], 7), ([300], 2)])
def test_is_the_composition_of_the_ops(
    path: str, sizes: Sizes, lengths: list[int], rows: int, dtype: torch.dtype
) -> None:
    one = case(sizes, dtype, lengths, rows, capacity=max(lengths) + rows)
    other = one.copy()
    assert_same_bits(one.run(0, one.num_layers), composition(other, 0, one.num_layers))
    assert_same_bits([one.k_cache, one.v_cache], [other.k_cache, other.v_cache])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_depth_can_be_cut_anywhere(path: str, sizes: Sizes, dtype: torch.dtype) -> None:
    one = case(sizes, dtype, [5, 0, 57], 7)
    untouched = one.copy()
    expected = one.run(0, one.num_layers)
    for cut in range(one.num_layers + 1):
        other = untouched.copy()
        shallow = other.run(0, cut)
        assert_same_bits(other.k_cache[cut:], untouched.k_cache[cut:], "in layers that did not run")
        assert_same_bits(other.run(cut, one.num_layers, shallow), expected, f"cut at {cut}")
        assert_same_bits([other.k_cache, other.v_cache], [one.k_cache, one.v_cache])


@pytest.mark.parametrize("optional", ["", "bias norm"])
def test_no_layers(path: str, optional: str) -> None:
    one = case(Sizes(optional=optional), torch.float32, [5, 0], 3)
    out = one.run(1, 1)
    assert_same_bits(out, one.hidden)
    assert out.data_ptr() != one.hidden.data_ptr()


@pytest.mark.parametrize(("lengths", "rows"), [([], 3), ([4], 0)])
def test_empty(path: str, lengths: list[int], rows: int) -> None:
    one = case(Sizes(), torch.float32, lengths, rows)
    assert one.run(0, 3).shape == (len(lengths), rows, 48)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_new_positions_of_its_layers_are_written(path: str, dtype: torch.dtype) -> None:
    one = case(Sizes(), dtype, [5, 0, 57], 7)
    before, weights, hidden = one.copy(), [w.clone() for w in one.weights], one.hidden.clone()
    one.run(1, 2)
    assert_same_bits([*one.weights, one.hidden], [*weights, hidden])
    for b, length in enumerate(one.seq_lens.tolist()):
        for cache, old in ((one.k_cache, before.k_cache), (one.v_cache, before.v_cache)):
            new = cache[1, b, :, length : length + 7]
            assert bool(new.isfinite().all())
            new.copy_(old[1, b, :, length : length + 7])
    assert_same_bits([one.k_cache, one.v_cache], [before.k_cache, before.v_cache])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_hidden(path: str, dtype: torch.dtype) -> None:
    one = case(Sizes(), dtype, [5, 0], 3)
    expected = one.copy().run(0, 3)
    transposed = one.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    assert_same_bits(one.run(0, 3, transposed), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("lengths", "count"), [([5, 0, 250], 4), ([5, 0, 250], 9), ([250], 21), ([*range(17)], 1)])
def test_rows_do_not_depend_on_each_other(
    isa: str, lengths: list[int], count: int, sizes: Sizes, dtype: torch.dtype
) -> None:
    """One row after another, each sequence alone: hidden states and cache as from all of them at once."""
    one = case(sizes, dtype, lengths, count, capacity=272)
    untouched = one.copy()
    whole = one.run(0, one.num_layers)
    for b in range(len(lengths)):
        rows = untouched.part(b, 0, count)
        for m in range(count):
            single = Case(rows.hidden[:, m : m + 1], one.weights, rows.k_cache, rows.v_cache, one.cos, one.sin,
                          rows.seq_lens + m)  # fmt: skip
            assert_same_bits(single.run(0, one.num_layers), whole[b : b + 1, m : m + 1], f"(row {m} of sequence {b})")
        assert_same_bits(rows.k_cache, one.k_cache[:, b : b + 1])
        assert_same_bits(rows.v_cache, one.v_cache[:, b : b + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [3, 6, 20])
def test_threads_agree(isa: str, rows: int, sizes: Sizes, dtype: torch.dtype) -> None:
    one = case(sizes, dtype, [5, 0, 250], rows, capacity=272)
    assert_threads_agree(lambda: (one.run(0, one.num_layers), one.k_cache.clone(), one.v_cache.clone()))


@pytest.mark.parametrize("length", [-1, 62])
def test_positions_outside_the_cache(path: str, length: int) -> None:
    one = case(Sizes(), torch.float32, [5, 0], 3)
    one.seq_lens[1] = length
    with pytest.raises((ValueError, RuntimeError), match=r"cache.*64"):
        one.run(0, 3)


@pytest.mark.parametrize("name", ["attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"])
def test_native_refuses_a_weight_of_the_wrong_shape(isa: str, name: str) -> None:
    """Kernels read through pointers, so the library itself must refuse, by name, what the shapes do not allow."""
    one = case(Sizes(), torch.float32, [5], 3)
    slot = ["attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"].index(name)
    one.weights[9 + slot] = one.weights[9 + slot][1:]
    with pytest.raises((ValueError, RuntimeError), match=name):
        one.run(0, 3)


@pytest.mark.parametrize("slot", range(9))
@pytest.mark.parametrize("layer_index", [0, 2])
def test_other_backends_refuse_weights_too(layer_index: int, slot: int) -> None:
    """The check behind every backend but the native one, which has its own."""
    name = ["attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"][slot]
    one = case(Sizes(), torch.float32, [5], 3)
    index = 9 * layer_index + slot
    whole = one.weights[index]
    for wrong, error, words in (
        (whole[1:], ValueError, name if layer_index else "expected|not a multiple"),
        (whole.bfloat16(), TypeError, f"{name} has dtype bfloat16"),
    ):
        one.weights[index] = wrong
        with lk.use_backend("reference"), pytest.raises(error, match=words):
            one.run(0, 3)
