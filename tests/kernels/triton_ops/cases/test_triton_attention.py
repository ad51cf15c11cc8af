"""rope_kv_append, verify_attention and partial_forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import ATTENTION_TOLERANCES, DTYPES, agrees, close, normal, on_backend, same_bits

import layerskip_kernels as lk
from layerskip_kernels import _checks
from tests.kernels.common import needles
from tests.kernels.test_verify_attention import arguments, check_later_rows

NAN = float("nan")
SPLIT = 128  # layerskip_kernels.triton.verify_attention.SPLIT, which cannot be imported where triton is absent


def angles(capacity: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(capacity).float(), frequency)
    return angle.cos().to(device), angle.sin().to(device)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=device)


def filled_cache(
    lengths: list[int], groups: int, capacity: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values up to each length, NaN beyond: what is not to be read."""
    caches = []
    for seed in (5, 6):
        cache = normal(seed, len(lengths), groups, capacity, size, dtype=dtype, device=device)
        for sequence, length in enumerate(lengths):
            cache[sequence, :, length:] = NAN
        caches.append(cache)
    return caches[0], caches[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 8), (3, 3, 24), (6, 1, 80), (4, 2, 128)])
def test_rope_kv_append(heads: int, groups: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    batch, rows, capacity = 3, 4, 20
    q = normal(0, batch, rows, heads, size, dtype=dtype, device=device)
    k, v = (normal(s, batch, rows, groups, size, dtype=dtype, device=device) for s in (1, 2))
    caches = [poisoned(batch, groups, capacity, size, dtype=dtype, device=device) for _ in range(2)]
    lengths = torch.tensor([0, 7, 16], device=device)
    agrees(lk.rope_kv_append, q, k, v, *angles(capacity, size, device), *caches, lengths)


def test_rope_kv_append_of_strided_rows(device: torch.device) -> None:
    """q, k and v as they lie side by side in one product; and one that has to be copied."""
    batch, rows, size, capacity = 2, 3, 16, 8
    side_by_side = normal(0, batch, rows, 8, size, device=device)
    q, k, v = side_by_side.split((4, 2, 2), dim=2)
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    caches = [poisoned(batch, 2, capacity, size, dtype=torch.float32, device=device) for _ in range(2)]
    lengths = torch.tensor([1, 5], device=device)
    agrees(lk.rope_kv_append, q, k, v, *angles(capacity, size, device), *caches, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "rows", "lengths"),
    [
        (4, 2, 16, 1, [0, 37]),
        (6, 2, 40, 7, [3, 100]),
        (8, 1, 64, 3, [SPLIT - 2, 5]),
        (2, 2, 128, 5, [SPLIT - 5, SPLIT, 2 * SPLIT + 3]),
        (1, 1, 256, 2, [70]),
        (2, 1, 8, 70, [0, 9]),
    ],
)
def test_verify_attention(
    heads: int, groups: int, size: int, rows: int, lengths: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    capacity = max(lengths) + rows
    q = normal(0, len(lengths), rows, heads, size, dtype=dtype, device=device)
    caches = filled_cache([length + rows for length in lengths], groups, capacity, size, dtype, device)
    out = agrees(lk.verify_attention, q, *caches, torch.tensor(lengths, device=device), tolerances=ATTENTION_TOLERANCES)
    assert out.isfinite().all()


def test_every_split_is_seen(device: torch.device) -> None:
    args, expected = needles(torch.float32, SPLIT)
    with lk.use_backend("triton"):
        same_bits(lk.verify_attention(*(arg.to(device) for arg in args)).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_attention_does_not_depend_on_the_batch(dtype: torch.dtype, device: torch.device) -> None:
    """Row by row, sequence by sequence, and with what comes later not yet written: the same bits."""
    rows, capacity, lengths = 7, SPLIT + 40, [SPLIT - 3, 20]
    q = normal(0, 2, rows, 6, 24, dtype=dtype, device=device)
    keys, values = filled_cache([length + rows for length in lengths], 2, capacity, 24, dtype, device)
    with lk.use_backend("triton"):
        together = lk.verify_attention(q, keys, values, torch.tensor(lengths, device=device))
        for sequence, length in enumerate(lengths):
            for m in range(rows):
                one = keys[sequence : sequence + 1].clone(), values[sequence : sequence + 1].clone()
                for cache in one:
                    cache[:, :, length + m + 1 :] = NAN
                at = torch.tensor([length + m], device=device)
                alone = lk.verify_attention(q[sequence : sequence + 1, m : m + 1], *one, at)
                same_bits(alone[0, 0], together[sequence, m])


@pytest.mark.parametrize("length", [-(2**63), -2, -1, 14, 2**31, 2**32 + 5, 2**63 - 1])
def test_rows_outside_the_cache_as_on_a_gpu(length: int, device: torch.device, monkeypatch) -> None:
    """Where no check looks at a length, a row of a negative one or past the end is NaN, and nothing is written."""
    monkeypatch.setattr(_checks, "positions", lambda *args: None)
    rows, capacity, lengths = 3, 16, torch.tensor([2, length], device=device)
    q = normal(0, 2, rows, 4, 8, device=device)
    k, v = (normal(seed, 2, rows, 2, 8, device=device) for seed in (1, 2))
    caches = [poisoned(2, 2, capacity, 8, dtype=torch.float32, device=device) for _ in range(2)]
    inside = [length >= 0 and length + m < capacity for m in range(rows)]
    with lk.use_backend("triton"):
        rotated = lk.rope_kv_append(q, k, v, *angles(capacity, 8, device), *caches, lengths)
        assert [int((~cache.isnan()).sum()) for cache in caches] == [(rows + sum(inside)) * 2 * 8] * 2
        attended = lk.verify_attention(q, *(cache.nan_to_num(0.5) for cache in caches), lengths)
    for out in (rotated, attended):
        assert out[0].isfinite().all()
        assert out[1].isnan().flatten(1).all(1).tolist() == [not one for one in inside]
        assert out[1].isnan().flatten(1).any(1).tolist() == [not one for one in inside]


def layer_weights(
    width: int, features: int, heads: int, groups: int, size: int, extras: str, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    queries, keys = heads * size, groups * size
    shapes: list[tuple[int, ...]] = [
        (width,), (queries, width), (keys, width), (keys, width), (width, queries), (width,), (features, width),
        (features, width), (width, features),
    ]  # fmt: skip
    biases, norms = "bias" in extras, "norm" in extras
    if extras:
        shapes += [(queries,), (keys,), (keys,)] if biases else [(0,)] * 3
        shapes += [(size,), (size,)] if norms else [(0,)] * 2
        if extras == "one bias":
            shapes[10] = shapes[11] = (0,)
    return [
        normal(seed, *shape, dtype=dtype, device=device, by=shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
        for seed, shape in enumerate(shapes, 20)
    ]


class Model:
    """Two layers with a cache, to be run by partial_forward or op by op."""

    layers, width, heads, groups, size, capacity, eps = 2, 48, 4, 2, 16, 40, 1e-5

    def __init__(self, extras: str, dtype: torch.dtype, device: torch.device) -> None:
        one = (self.width, 56, self.heads, self.groups, self.size, extras, dtype, device)
        first = layer_weights(*one)
        self.weights = first + [weight.flip(0).contiguous() for weight in first]
        self.slots, self.device = len(first), device
        self.hidden = normal(0, 2, 5, self.width, dtype=dtype, device=device)
        self.lengths = torch.tensor([3, 20], device=device)
        self.caches = [
            normal(seed, self.layers, 2, self.groups, self.capacity, self.size, dtype=dtype, device=device)
            for seed in (1, 2)
        ]

    def forward(
        self, hidden: Tensor, start: int, end: int, caches: list[Tensor], lengths: Tensor, slots: Tensor | None = None
    ) -> Tensor:
        weights = self.weights[start * self.slots : end * self.slots]
        cos, sin = angles(self.capacity, self.size, self.device)
        cache = lk.KVCache(*caches, cos, sin, lengths, slots)
        return lk.partial_forward(hidden, weights, cache, start, end, self.eps)

    def op_by_op(self, caches: list[Tensor]) -> Tensor:
        hidden = self.hidden
        for layer in range(self.layers):
            w = [one if one.numel() else None for one in self.weights[layer * self.slots : (layer + 1) * self.slots]]
            w += [None] * (14 - len(w))
            flat = hidden.reshape(-1, self.width)
            normed = lk.rms_norm(flat, w[0], self.eps)
            q, k, v = (lk.linear(normed, w[1 + i], w[9 + i]).view(2, 5, -1, self.size) for i in range(3))
            q = q if w[12] is None else lk.rms_norm(q, w[12], self.eps)
            k = k if w[13] is None else lk.rms_norm(k, w[13], self.eps)
            one = [cache[layer] for cache in caches]
            q = lk.rope_kv_append(q, k, v, *angles(self.capacity, self.size, self.device), *one, self.lengths)
            attended = lk.verify_attention(q, *one, self.lengths).view(10, -1)
            flat = lk.linear(attended, w[4], None, flat)
            gated = lk.swiglu(lk.rms_norm(flat, w[5], self.eps), w[6], w[7])
            hidden = lk.linear(gated, w[8], None, flat).view(2, 5, self.width)
        return hidden


EXTRAS = [(extras, torch.float16) for extras in ("", "bias", "norm", "one bias")]
EXTRAS += [("bias norm", dtype) for dtype in DTYPES]


@pytest.mark.parametrize(("extras", "dtype"), EXTRAS)
def test_partial_forward(extras: str, dtype: torch.dtype, device: torch.device) -> None:
    """The bits of its ops, one by one, and the reference's values.

    Two layers of rounded states: a few units in the last place of values around 4.
    """
    model = Model(extras, dtype, device)
    ours, by_op, truth = ([cache.clone() for cache in model.caches] for _ in range(3))
    with lk.use_backend("triton"):
        out = model.forward(model.hidden, 0, 2, ours, model.lengths)
        expected = model.op_by_op(by_op)
    for mine, other in zip([out, *ours], [expected, *by_op], strict=True):
        same_bits(mine, other)
    true, _ = on_backend("reference", model.forward, model.hidden, 0, 2, truth, model.lengths)
    for mine, other in zip([out, *ours], [true, *truth], strict=True):
        close(mine, other, 8 * ATTENTION_TOLERANCES[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_layers_rows_and_sequences_may_be_taken_apart(dtype: torch.dtype, device: torch.device) -> None:
    model = Model("bias norm", dtype, device)
    with lk.use_backend("triton"):
        caches = [cache.clone() for cache in model.caches]
        whole = model.forward(model.hidden, 0, 2, caches, model.lengths)
        apart = [cache.clone() for cache in model.caches]
        shallow = model.forward(model.hidden, 0, 1, apart, model.lengths)
        same_bits(model.forward(shallow, 1, 2, apart, model.lengths), whole)
        for sequence in range(2):
            one = [cache[:, sequence : sequence + 1].contiguous() for cache in model.caches]
            for m in range(3):
                row = model.hidden[sequence : sequence + 1, m : m + 1]
                out = model.forward(row, 0, 2, one, model.lengths[sequence : sequence + 1] + m)
                same_bits(out[0, 0], whole[sequence, m])


def test_slots_change_no_bit(device: torch.device) -> None:
    """Two sequences in a cache of five rows: what rows of their own give, bit for bit; nothing else is touched."""
    model = Model("norm", torch.float16, device)
    slots, lengths = torch.tensor([4, 0], device=device), model.lengths
    roomy = [poisoned(2, 5, 2, model.capacity, model.size, dtype=torch.float16, device=device) for _ in range(2)]
    for cache, own in zip(roomy, model.caches, strict=True):
        cache[:, slots] = own
    before = [cache.clone() for cache in roomy]
    with lk.use_backend("triton"):
        plain = model.forward(model.hidden, 0, 2, model.caches, lengths)
        same_bits(model.forward(model.hidden, 0, 2, roomy, lengths, slots), plain)
    for cache, own, old in zip(roomy, model.caches, before, strict=True):
        same_bits(cache[:, slots], own)
        assert torch.equal(cache[:, 1:4].isnan(), old[:, 1:4].isnan())


@pytest.mark.parametrize("rows", [1, 3])
def test_ops_with_slots_agree_with_the_reference(rows: int, device: torch.device) -> None:
    size, capacity = 16, 24
    slots, lengths = torch.tensor([2, 3, 0], device=device), torch.tensor([0, 7, 20], device=device)
    q = normal(0, 3, rows, 4, size, device=device)
    k, v = (normal(s, 3, rows, 2, size, device=device) for s in (1, 2))
    caches = [normal(s, 4, 2, capacity, size, device=device) for s in (3, 4)]
    agrees(lk.rope_kv_append, q, k, v, *angles(capacity, size, device), *caches, lengths, slots)
    agrees(lk.verify_attention, q, *caches, lengths, slots)


def test_a_slot_outside_the_cache(device: torch.device) -> None:
    """On the CPU it raises; on a GPU its sequence comes out as NaN, and nothing is written."""
    model = Model("", torch.float32, device)
    for wrong in ([1, 2], [-1, 0]):
        slots = torch.tensor(wrong, device=device)
        with lk.use_backend("triton"):
            if device.type == "cpu":
                with pytest.raises(ValueError, match=rf"slots must be distinct and in \[0, 2\), got \[{wrong[0]}"):
                    model.forward(model.hidden, 0, 2, model.caches, model.lengths, slots)
                continue
            out = model.forward(model.hidden, 0, 2, model.caches, model.lengths, slots)
            outside = (slots < 0) | (slots > 1)
            assert out[outside].isnan().all()
            assert out[~outside].isfinite().all()


def test_no_layers_and_no_rows(device: torch.device) -> None:
    model = Model("", torch.float32, device)
    with lk.use_backend("triton"):
        same_bits(model.forward(model.hidden, 1, 1, model.caches, model.lengths), model.hidden)
        assert model.forward(model.hidden[:, :0], 0, 2, model.caches, model.lengths).shape == (2, 0, 48)


def test_a_full_cache(device: torch.device) -> None:
    """On the CPU it raises; on a GPU, where that would be a host sync, the row is NaN and nothing is written."""
    model = Model("", torch.float32, device)
    lengths = torch.tensor([3, 36], device=device)
    before = [cache.clone() for cache in model.caches]
    with lk.use_backend("triton"):
        if device.type == "cpu":
            with pytest.raises(ValueError, match="position 40 is outside the cache's 40"):
                model.forward(model.hidden, 0, 2, model.caches, lengths)
            return
        out = model.forward(model.hidden, 0, 2, model.caches, lengths)
    assert out[0].isfinite().all()
    assert out[1, 4].isnan().all()
    assert out[1, :4].isfinite().all()
    for cache, old in zip(model.caches, before, strict=True):
        same_bits(cache[:, :, :, :3], old[:, :, :, :3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_harms_no_earlier_one(value: float, dtype: torch.dtype, device: torch.device) -> None:
    """Within a tile, and across pieces."""
    args = [one.to(device) for one in arguments(dtype, [0, SPLIT - 2], 6, 3, 1, 16, capacity=SPLIT + 8)]
    with lk.use_backend("triton"):
        check_later_rows(lk.verify_attention, args, value)
