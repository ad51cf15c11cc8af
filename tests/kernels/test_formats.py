"""Packed weights: their formats, and every op that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels import formats
from layerskip_kernels.formats import FORMATS
from layerskip_kernels.reference import linear_ref, partial_forward_ref, swiglu_ref
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, bind
from layerskip_kernels.speculative import compose_draft, compose_round

from .common import (
    DTYPES,
    MANY_ROWS,
    TOLERANCES,
    Inputs,
    assert_as_good_as,
    assert_rows_alone,
    assert_same_bits,
    assert_threads_agree,
    double,
    run,
)
from .examples import EPS, example

WIDTHS = {32: (96, 576), 128: (128, 384)}
SMALL = [name for name, one in FORMATS.items() if one.group_size == 32]
CASES = [(name, width) for name, one in FORMATS.items() for width in WIDTHS[one.group_size]]
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

# What rounding to nearest may lose of a normal vector, relative: half a step of 127, 448 (fp8: 3 bits of mantissa) or
# 7 to 15 in the range of a group; twice what was seen would not tell the formats apart.
LOSSES = {"int8": 0.008, "fp8": 0.035, "int4_zero": 0.11, "int4": 0.12}


def loss_of(name: str) -> float:
    return next(limit for start, limit in LOSSES.items() if name.startswith(start))


def random_packed(name: str, rows: int, width: int, seed: int = 0) -> Tensor:
    """A packed weight with every value that a format has, and scales of both signs."""
    form, generator = FORMATS[name], torch.Generator().manual_seed(seed)
    shape = (rows, width // form.group_size, form.group_size)
    low, high = (0, 16) if form.bits == 4 else (-128, 128)
    values = torch.randint(low, high, shape, generator=generator)
    if form.is_float:
        values = (values / 127).clamp(-1, 1).mul(448).to(torch.float8_e4m3fn)
    else:
        values = values.to(torch.uint8 if form.bits == 4 else torch.int8)
    sign = torch.randint(0, 2, shape[:2], generator=generator) * 2 - 1
    scale = sign * (0.5 + torch.rand(shape[:2], generator=generator)) * width**-0.5 / (8 if form.bits == 4 else 100)
    least = -scale * (4 + 8 * torch.rand(shape[:2], generator=generator)) if form.has_zero else None
    return formats.pack(form, values, scale, least)


@pytest.mark.parametrize(("name", "width"), CASES)
def test_the_bytes_name_the_format(name: str, width: int) -> None:
    weight = random_packed(name, 3, width)
    assert weight.dtype == torch.uint8
    assert weight.shape == (3, FORMATS[name].row_bytes(width))
    assert formats.format_of(weight, width).name == name


def test_no_two_formats_have_the_same_bytes() -> None:
    sizes = [one.row_bytes(128) for one in FORMATS.values()]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(("name", "width"), CASES)
def test_packing_round_trip(name: str, width: int) -> None:
    """What was packed comes out: values, and scales as fp16 holds them."""
    form = FORMATS[name]
    weight = random_packed(name, 5, width)
    values, scale, least = formats.unpack(weight, width)
    kind = torch.float8_e4m3fn if form.is_float else torch.uint8 if form.bits == 4 else torch.int8
    assert_same_bits(formats.pack(form, values.to(kind), scale, least), weight)


def test_blocks_of_llama_cpp() -> None:
    """Q8_0, Q4_0 and Q4_1 by the bytes: scale, least value, then value 0 in the low and value 16 in the high bits."""
    one = torch.tensor([[1.0]]).to(torch.float16).view(torch.uint8).flatten().tolist()
    half = torch.tensor([[0.5]]).to(torch.float16).view(torch.uint8).flatten().tolist()
    nibbles = torch.arange(32) % 16
    packed = [(n | (n + 16) % 16 << 4) for n in range(16)]
    expected = {
        "int8": one + [n % 256 for n in range(-16, 16)],
        "int4": one + packed,
        "int4_zero": one + half + packed,
    }
    for name, content in expected.items():
        values = (torch.arange(-16, 16) if name == "int8" else nibbles).view(1, 1, 32)
        least = torch.tensor([[0.5]]) if name == "int4_zero" else None
        weight = formats.pack(
            FORMATS[name], values.to(torch.int8 if name == "int8" else torch.uint8), torch.ones(1, 1), least
        )
        assert weight.tolist() == [content]
        shift = {"int8": 0.0, "int4": -8.0, "int4_zero": 0.5}[name]
        assert formats.dequantize(weight, 32).tolist() == [(values.flatten() + shift).tolist()]


@pytest.mark.parametrize(("name", "width"), CASES)
def test_quantizing_loses_little(name: str, width: int) -> None:
    weight = Inputs(torch.float32).normal(40, width)
    packed = formats.quantize(weight, name)
    assert formats.format_of(packed, width).name == name
    lost = (formats.dequantize(packed, width) - weight).norm() / weight.norm()
    assert 0 < lost < loss_of(name)


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if not one.is_float])
def test_values_are_rounded_with_the_headers_as_stored(name: str) -> None:
    """A scale or least value that fp16 does not hold changes when it is stored, and the values would not fit it."""
    groups = Inputs(torch.float32).normal(20, 3, FORMATS[name].group_size)
    for header in formats.fit(FORMATS[name], groups)[1:]:
        assert_same_bits(header.half().float(), header)


@pytest.mark.parametrize("name", FORMATS)
def test_quantizing_in_several_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Inputs(torch.float32).normal(7, 128)
    whole = formats.quantize(weight, name)
    monkeypatch.setattr(formats, "_AT_ONCE", 3 * 128)  # three rows, twice, and one
    assert_same_bits(formats.quantize(weight, name), whole)
    weight[5, 3] = float("nan")
    with pytest.raises(ValueError, match="row 5 of the weight to quantize holds NaN or infinity"):
        formats.quantize(weight, name)


@pytest.mark.parametrize("name", FORMATS)
def test_quantizing_zeros_and_what_is_exact(name: str) -> None:
    assert formats.dequantize(formats.quantize(torch.zeros(2, 128), name), 128).abs().max() == 0
    if FORMATS[name].bits == 4:
        steps = torch.arange(128.0).view(1, 128) % 16 - 8  # -8 … 7
        assert_same_bits(formats.dequantize(formats.quantize(steps, name), 128), steps)


@pytest.mark.parametrize("name", ["int4", "int4_zero"])
def test_quantizing_refuses_what_fp16_scales_cannot_hold(name: str) -> None:
    weight = torch.zeros(1, 64)
    weight[0, 3] = 2e6
    with pytest.raises(ValueError, match="fp16 cannot hold the scale"):
        formats.quantize(weight, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantizing_refuses_what_is_not_finite(value: float) -> None:
    weight = torch.zeros(3, 64)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="row 2 of the weight to quantize holds NaN or infinity"):
        formats.quantize(weight, "int8")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown weight format 'int3', expected one of int8"):
        formats.quantize(torch.zeros(1, 32), "int3")
    with pytest.raises(ValueError, match="int8_g128 takes widths that are multiples of 128, got 96"):
        formats.quantize(torch.zeros(1, 96), "int8_g128")
    with pytest.raises(ValueError, match="weight: 35 bytes a row are no format of width 32"):
        lk.linear(torch.zeros(1, 32), torch.zeros(2, 35, dtype=torch.uint8))
    with pytest.raises(ValueError, match="fp16 cannot hold the scale"):
        formats.pack(FORMATS["int8"], torch.zeros(1, 1, 32, dtype=torch.int8), torch.tensor([[1e6]]))
    with pytest.raises(ValueError, match="fp16 cannot hold the scale"):
        formats.pack(FORMATS["int8"], torch.zeros(1, 1, 32, dtype=torch.int8), torch.tensor([[7.5e-8]]))


def test_gate_and_up_are_packed_alike(path: str) -> None:
    plain, packed = torch.zeros(4, 32), random_packed("int8", 4, 32)
    with pytest.raises(ValueError, match="gate and up must be all plain, all of integers, or all of fp8"):
        lk.swiglu(torch.zeros(1, 32), plain, packed)


@pytest.mark.parametrize(("changed", "message"), [("k", "q and k"), ("v", "q and v"), ("up", "gate and up")])
def test_weights_of_one_product_are_packed_alike(path: str, changed: str, message: str) -> None:
    args = packed_example("partial_forward", torch.float32, "int8")
    args["weights"][REQUIRED_WEIGHTS.index(changed)] = example("partial_forward")["weights"][
        REQUIRED_WEIGHTS.index(changed)
    ]
    with pytest.raises(ValueError, match=f"{message} must be all plain, all of integers, or all of fp8"):
        run("partial_forward", **args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "width"), CASES)
def test_linear(path: str, name: str, width: int, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    weight = random_packed(name, 70, width)
    plain = formats.dequantize(weight, width, dtype)
    for rows in (*range(1, 14), *MANY_ROWS):
        x, bias, residual = make.normal(rows, width), make.normal(70), make.normal(rows, 70)
        truth = linear_ref(x.double(), weight, bias.double(), residual.double())
        eager = F.linear(x, plain, bias) + residual
        assert_as_good_as(lk.linear(x, weight, bias, residual), eager, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "width"), CASES)
def test_swiglu(path: str, name: str, width: int, dtype: torch.dtype) -> None:
    x, gate, up = Inputs(dtype).normal(9, width), random_packed(name, 37, width), random_packed(name, 37, width, 1)
    a, b = (F.linear(x, formats.dequantize(one, width, dtype)) for one in (gate, up))
    assert_as_good_as(lk.swiglu(x, gate, up), F.silu(a) * b, swiglu_ref(x.double(), gate, up), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_alone(isa: str, name: str, dtype: torch.dtype) -> None:
    """A row's bits do not depend on how many rows, or threads, there are."""
    x, weight = Inputs(dtype).normal(61, 128), random_packed(name, 70, 128)
    assert_rows_alone(lambda rows: lk.linear(rows, weight), x)
    assert_threads_agree(lambda: lk.linear(x, weight))


@pytest.mark.parametrize("name", ["int8", "int8_g128", "int4", "int4_zero_g128"])
def test_rows_too_wide_for_the_nearest_cache(isa: str, name: str) -> None:
    """With more than 24 KiB of activations rows of weights go side by side."""
    make = Inputs(torch.bfloat16)
    x, plain = make.normal(19, 6144), make.weight(7, 6144)
    weight = formats.quantize(plain, name)
    assert_rows_alone(lambda rows: lk.linear(rows, weight), x)
    truth = x.double() @ formats.dequantize(weight, 6144).double().T
    error = (lk.linear(x, weight).double() - truth).abs().max() / truth.abs().max()
    assert error < 2**-8  # of bf16, in which the result is written


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_nan_stays_in_its_row(path: str, name: str, dtype: torch.dtype) -> None:
    x, weight = Inputs(dtype).normal(8, 128), random_packed(name, 21, 128)
    whole = lk.linear(x, weight)
    for row, value in ((2, float("nan")), (5, float("inf"))):
        x[row, 77] = value
    out = lk.linear(x, weight)
    sound = [0, 1, 3, 4, 6, 7]
    assert not out[2].isfinite().any()
    assert not out[5].isfinite().all()
    torch.testing.assert_close(out[sound], whole[sound])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_the_size_of_a_row_does_not_matter(isa: str, scale: float) -> None:
    """Sixteen-bit activations have a scale a row: rows of any size are as exact, and what is too small becomes zero."""
    x, weight = Inputs(torch.bfloat16).normal(3, 128), random_packed("int8", 21, 128)
    small = (x.float() * scale).to(torch.bfloat16)
    truth = linear_ref(small.double(), weight)
    error = (lk.linear(small, weight).double() - truth).abs().max()
    assert error <= max(2.0**-8 * float(truth.abs().max()), 1e-35)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_plain_by_the_native_kernel(isa: str, name: str, dtype: torch.dtype) -> None:
    """The bits of the reference, on which it rests that what was looked up and what was read embed alike."""
    weight = random_packed(name, 33, 256)
    assert_same_bits(formats.plain(weight, 256, dtype), formats.dequantize(weight, 256, dtype))


def test_every_fp8_number(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 1, 32)
    weight = formats.pack(FORMATS["fp8"], codes.view(torch.float8_e4m3fn), torch.full((8, 1), 0.75))
    for dtype in DTYPES:
        found, expected = formats.plain(weight, 32, dtype), formats.dequantize(weight, 32, dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert_same_bits(found.nan_to_num(), expected.nan_to_num())


def test_width_zero(path: str) -> None:
    x = torch.zeros(3, 0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="0 bytes a row are no format of width 0"):
        lk.linear(x, torch.zeros(2, 0, dtype=torch.uint8))
    out = lk.exit_head(x, torch.zeros(0, dtype=torch.bfloat16), torch.zeros(5, 0, dtype=torch.int8), EPS,
                       scale=torch.ones(5))  # fmt: skip
    assert out.token.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", FORMATS)
def test_lookup(name: str) -> None:
    weight, index = random_packed(name, 9, 128), torch.tensor([[3, 0], [8, 3]])
    expected = formats.dequantize(weight, 128, torch.bfloat16)[index]
    assert_same_bits(formats.lookup(weight, index, 128, torch.bfloat16), expected)


def packed_example(op: str, dtype: torch.dtype, name: str, draw: int = 0) -> dict[str, Any]:
    """The example of an op with packed layers, embedding and head."""
    args = example(op, dtype)

    def packed(weight: Tensor, seed: int) -> Tensor:
        width = weight.shape[1]
        # A width that is no multiple of a group, F = 24, stays plain: formats may differ from weight to weight.
        return weight if width % 32 else random_packed(name, weight.shape[0], width, seed + 1000 * draw)

    if "weights" in args:
        count = len(REQUIRED_WEIGHTS)
        args["weights"] = [
            packed(weight, index) if REQUIRED_WEIGHTS[index % count] in MATRICES else weight
            for index, weight in enumerate(args["weights"])
        ]
    for key in ("embedding", "head_weight"):
        if key in args:
            args[key] = packed(args[key], 100)
    return args | ({"scale": None} if "scale" in args else {})


def copied(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_exit_head(path: str, name: str, dtype: torch.dtype) -> None:
    args = packed_example("exit_head", dtype, name) | {"token_map": None}
    logits = torch.empty(args["hidden"].shape[0], args["head_weight"].shape[0])
    out = run("exit_head", **{**args, "temperature": None, "seed": None, "offset": None, "logits": logits})
    assert_same_bits(out.token, logits.argmax(1))
    normed = F.rms_norm(args["hidden"].double(), (32,), args["norm_weight"].double(), EPS)
    truth = normed @ formats.dequantize(args["head_weight"], 32, torch.float64).T
    eager = F.linear(normed.to(dtype), formats.dequantize(args["head_weight"], 32, dtype))
    assert_as_good_as(logits, eager.float(), truth, dtype)


def assert_one_call_has_the_bits_of_its_parts(op: str, args: dict[str, Any]) -> None:
    compose = compose_draft if op == "draft" else compose_round
    ops = {
        one: getattr(torch.ops.layerskip, one).default
        for one in ("draft", "partial_forward", "exit_head", "accept_greedy", "accept_sampled")
    }
    own, other = copied(args), copied(args)
    expected = compose(ops, *bind(op, **other))
    actual = getattr(torch.ops.layerskip, op).default(*bind(op, **own))
    for one, two in list(zip(actual, expected, strict=True))[:-1]:
        assert_same_bits(one, two)
    torch.testing.assert_close(actual[-1], expected[-1], rtol=1e-6, atol=0)
    for cache in ("k_cache", "v_cache"):
        assert_same_bits(own[cache], other[cache])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("op", ["draft", "speculative_round"])
def test_one_call_has_the_bits_of_its_parts(isa: str, op: str, name: str, dtype: torch.dtype) -> None:
    assert_one_call_has_the_bits_of_its_parts(op, packed_example(op, dtype, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_partial_forward(isa: str, name: str, dtype: torch.dtype) -> None:
    """No further from the float64 truth than plain weights of the same values; many draws, since roundings are luck."""
    errors = torch.tensor([partial_forward_errors(name, dtype, draw) for draw in range(4)]).norm(dim=0)
    assert errors[0] <= errors[1] + errors[2]


def partial_forward_errors(name: str, dtype: torch.dtype, draw: int) -> tuple[float, float, float]:
    """Of packed weights, of plain ones in torch, and what TOLERANCES allows."""
    args = packed_example("partial_forward", dtype, name, draw)
    widths = dict.fromkeys(("q", "k", "v", "gate", "up"), 32) | {"o": 64, "down": 24}
    names = [REQUIRED_WEIGHTS[i % len(REQUIRED_WEIGHTS)] for i in range(len(args["weights"]))]
    plain = copied(args)
    plain["weights"] = [
        formats.dequantize(weight, widths[one], dtype) if one in MATRICES else weight
        for one, weight in zip(names, args["weights"], strict=True)
    ]
    wide = {key: value if key in ("cos", "sin") else double(value) for key, value in copied(args).items()}
    truth = partial_forward_ref(*bind("partial_forward", **wide))
    with lk.use_backend("reference"):
        eager = run("partial_forward", **plain)
    actual = run("partial_forward", **args)
    distances = [float((one.double() - truth).norm()) for one in (actual, eager)]
    return distances[0], distances[1], TOLERANCES[dtype] * float(truth.norm())
