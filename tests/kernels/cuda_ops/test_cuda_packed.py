"""Packed weights on csrc/cuda, against float64 on what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels.formats import FORMATS, dequantize, pack, quantize
from layerskip_kernels.reference import draft_ref, exit_head_ref, linear_ref, swiglu_ref
from layerskip_kernels.speculative import compose_draft, compose_round
from tests.cuda_emulation import EmulationError

from ..common import DTYPES, Inputs, assert_as_good_as, assert_rows_alone, assert_same_bits, double
from ..examples import SIZES, example
from ..test_exit_head import EPS, eager
from ..test_partial_forward import Sizes, case
from .cases import misaligned
from .runners import Emulated, Ops
from .test_cuda_partial_forward import composition, run
from .test_cuda_round import as_good, copied, parts

# R, blocks of 32 columns, D_out: one group for eight warps; groups that share out unevenly, rows of weights that begin
# anywhere; two tiles of x; more bytes than the ring holds, so that groups lie across its ends; many rows.
SHAPES = [(1, 4, 1), (5, 36, 21), (17, 8, 16), (2, 516, 18), (49, 4, 5), (40, 36, 5)]


def packed(make: Inputs, name: str, rows: int, width: int) -> Tensor:
    return quantize(make.weight(rows, width).float(), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "blocks", "outputs"), SHAPES)
def test_linear_float64(ops: Ops, rows: int, blocks: int, outputs: int, name: str, dtype: torch.dtype) -> None:
    make, width = Inputs(dtype), 32 * blocks
    x, weight = make.normal(rows, width), packed(make, name, outputs, width)
    bias, residual = (make.normal(outputs), make.normal(rows, outputs)) if rows % 2 else (None, None)
    plain = dequantize(weight, width, dtype)
    same = F.linear(x, plain, bias) if residual is None else F.linear(x, plain, bias) + residual
    truth = linear_ref(double(x), weight, *double([bias, residual]))
    assert_as_good_as(ops.linear(x, weight, bias, residual), same, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4", "int4_zero", "fp8"])
@pytest.mark.parametrize("blocks", [1, 3, 9, 17, 43])
def test_widths_that_are_any_number_of_groups(ops: Ops, blocks: int, name: str, dtype: torch.dtype) -> None:
    """Warps without a group, and rows that begin at any even byte; the weights are integers, so the sum is exact."""
    make, width = Inputs(torch.float32), 32 * blocks
    values = make.integers(0, 8, 19, blocks, 32).to(torch.float8_e4m3fn if name == "fp8" else torch.uint8)
    weight = pack(FORMATS[name], values, torch.ones(19, blocks), torch.ones(19, blocks) if "zero" in name else None)
    x = make.integers(-3, 4, 3, width)
    expected = x.double() @ dequantize(weight, width).double().T
    assert_same_bits(ops.linear(x.to(dtype), weight), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "blocks", "features"), SHAPES[:4])
def test_swiglu_float64(ops: Ops, rows: int, blocks: int, features: int, name: str, dtype: torch.dtype) -> None:
    make, width = Inputs(dtype), 32 * blocks
    x, gate, up = make.normal(rows, width), packed(make, name, features, width), packed(make, name, features, width)
    same = F.silu(F.linear(x, dequantize(gate, width, dtype))) * F.linear(x, dequantize(up, width, dtype))
    assert_as_good_as(ops.swiglu(x, gate, up), same, swiglu_ref(double(x), gate, up), dtype)


# R, blocks, V: a tile; more tiles than warps, rows that begin anywhere, two passes; longer than the ring.
HEAD_SHAPES = [(1, 4, 9), (17, 4, 1100), (3, 36, 1100), (7, 132, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "blocks", "vocab_size"), HEAD_SHAPES)
def test_exit_head_float64(ops: Ops, rows: int, blocks: int, vocab_size: int, name: str, dtype: torch.dtype) -> None:
    make, width = Inputs(dtype), 32 * blocks
    hidden, norm, weight = make.normal(rows, width, scale=3.0), make.norm(width), packed(make, name, vocab_size, width)
    token_map = make.integers(0, 2**33, vocab_size)
    logits = torch.full((rows, vocab_size), float("nan"))
    out = ops.exit_head(hidden, norm, weight, EPS, token_map, None, None, None, None, logits)
    truth = torch.empty_like(logits, dtype=torch.float64)
    _, logit, logsumexp = exit_head_ref(*double([hidden, norm]), weight, EPS, token_map, *[None] * 4, truth)
    same = eager([hidden, norm, dequantize(weight, width), EPS, None, None])
    assert_as_good_as(out.logit, same[0], logit, dtype)
    assert_as_good_as(out.logsumexp, same[1], logsumexp, dtype)
    normed = F.rms_norm(hidden, (width,), norm, EPS).float()
    assert_as_good_as(logits, normed @ dequantize(weight, width).T, truth, dtype)
    assert out.token.tolist() == token_map[logits.argmax(-1)].tolist()
    assert_same_bits(out.logit, logits.amax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4_zero_g128", "fp8"])
def test_rows_do_not_depend_on_each_other(ops: Ops, name: str, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, residual, norm = make.normal(18, 640), make.normal(18, 20), make.norm(640)
    weight, up = packed(make, name, 20, 640), packed(make, name, 20, 640)
    assert_rows_alone(lambda x, residual: ops.linear(x, weight, None, residual), x, residual)
    assert_rows_alone(lambda x: ops.swiglu(x, weight, up), x)
    assert_rows_alone(lambda x: tuple(ops.exit_head(x, norm, weight, EPS)), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4_zero_g128", "fp8"])
@pytest.mark.parametrize("rows", [17, 32, 33, 49, 65])
def test_many_rows_have_the_bits_of_few(ops: Ops, rows: int, name: str, dtype: torch.dtype) -> None:
    """Of which a block takes up to 64, but 16 in fp32."""
    make = Inputs(dtype)
    x, residual, norm = make.normal(rows, 640), make.normal(rows, 20), make.norm(640)
    weight, up = packed(make, name, 20, 640), packed(make, name, 20, 640)

    def products(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        head = ops.exit_head(x, norm, weight, EPS)
        return *head, ops.linear(x, weight, None, residual), ops.swiglu(x, weight, up)

    whole = products(x, residual)
    for first in range(0, rows, 7):
        few = slice(first, min(first + 7, rows))
        assert_same_bits(products(x[few], residual[few]), [one[few] for one in whole], f"(rows from {first})")


@pytest.mark.parametrize(
    ("name", "dtype"), [("int8", torch.float32), ("int4_zero_g128", torch.bfloat16), ("fp8", torch.float16)]
)
def test_parts_of_states_have_the_bits_of_whole_ones(emulated: type[Emulated], name: str, dtype: torch.dtype) -> None:
    """Three parts, the last one narrower, each longer than the ring in int8; several tiles a warp, of some one less."""
    make, rows = Inputs(dtype), 16 if dtype == torch.float32 else 64
    width = (3200 if dtype == torch.float32 else 1408) + (0 if "g128" in name else 32)
    x, norm, weight = make.normal(rows, width), make.norm(width), packed(make, name, 16 * 170 + 5, width)
    whole = emulated(1, 80).exit_head(x, norm, weight, EPS)
    part = emulated(2, 80).exit_head(x[-3:], norm, weight, EPS)
    assert_same_bits(part, [one[-3:] for one in whole])


MODEL = Sizes(hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=256, num_layers=1)


def pack_layers(weights: list[Tensor], names: list[str], each: int) -> list[Tensor]:
    """The matmuls' weights of layers in the formats ``names``: of q, k and v, o, gate and up, down."""
    places = {1: 0, 2: 0, 3: 0, 4: 1, 6: 2, 7: 2, 8: 3}
    return [
        quantize(weight.float(), names[places[i % each]])
        if names[places.get(i % each, 0)] and i % each in places
        else weight
        for i, weight in enumerate(weights)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [["int8"] * 4, ["int4", "", "int4_zero_g128", "int8_g128"], ["fp8_g128", "fp8"] * 2])
@pytest.mark.parametrize("optional", ["", "bias norm"])
def test_a_forward_is_the_composition_of_the_ops(ops: Ops, optional: str, names: list[str], dtype: torch.dtype) -> None:
    one = case(Sizes(**{**vars(MODEL), "optional": optional}), dtype, [5, 0], 3)
    one.weights = pack_layers(one.weights, names, len(one.weights))
    other = one.copy()
    assert_same_bits(run(ops, one, 0, 1), composition(ops, other))
    assert_same_bits((one.k_cache, one.v_cache), (other.k_cache, other.v_cache))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4_zero", "fp8_g128"])
@pytest.mark.parametrize("batch", [4, 8])
def test_a_forward_of_many_rows_has_the_bits_of_few(ops: Ops, batch: int, name: str, dtype: torch.dtype) -> None:
    """Of 20 and 40 rows, normed on their way."""
    whole = case(MODEL, dtype, [5, 0, 9, 2, 7, 1, 3, 4][:batch], 5)
    whole.weights = pack_layers(whole.weights, [name] * 4, len(whole.weights))
    parts = [whole.part(number, 0, 5) for number in range(batch)]
    hidden = run(ops, whole, 0, 1)
    for number, part in enumerate(parts):
        assert_same_bits(run(ops, part, 0, 1), hidden[number : number + 1], f"(sequence {number})")


def packed_args(op: str, dtype: torch.dtype, embedding: str, head: str, layers: str) -> dict[str, Any]:
    """The example, but for `down`, which is not as wide as a group, packed."""
    args = example(op, dtype)
    changed = {"embedding": quantize(args["embedding"].float(), embedding)}
    if args.get("scale") is None:
        changed["head_weight"] = quantize(args["head_weight"].float(), head)
    changed["weights"] = pack_layers(args["weights"], [layers, layers, layers, ""], 9)
    return {**args, **changed}


ALL_PACKED = [("int8", "int4", "fp8"), ("int4_zero", "int8", "int4"), ("fp8", "fp8", "int8")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", ALL_PACKED)
def test_a_draft_is_the_composition_of_the_ops(ops: Ops, names: tuple[str, str, str], dtype: torch.dtype) -> None:
    args = {**packed_args("draft", dtype, *names), "scale": None, "token_map": None}
    args["head_weight"] = packed(Inputs(dtype), names[1], SIZES["V"], SIZES["D"])
    theirs, before = copied(args), copied(args)
    out, expected = ops.draft(*args.values()), compose_draft(parts(ops), *theirs.values())
    assert_same_bits(tuple(out[:2]), expected[:2])
    assert_same_bits((args["k_cache"], args["v_cache"]), (theirs["k_cache"], theirs["v_cache"]))
    wide = {name: double(one) for name, one in before.items()}
    as_good(out.states, draft_ref(*before.values())[1], draft_ref(*wide.values())[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", ALL_PACKED)
def test_a_round_is_the_composition_of_the_ops(ops: Ops, names: tuple[str, str, str], dtype: torch.dtype) -> None:
    """The head of the draft is int8 rows, the one that verifies is packed."""
    args = packed_args("speculative_round", dtype, *names)
    theirs = copied(args)
    out, expected = ops.speculative_round(*args.values()), compose_round(parts(ops), *theirs.values())
    assert_same_bits(tuple(out), tuple(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_has_its_value(ops: Ops, dtype: torch.dtype) -> None:
    """All 256 bytes of int8 and of fp8, where NaN stays NaN, and all sixteen of int4, in each of the 32 columns."""
    for name in ("int8", "fp8", "int4", "int4_zero"):
        form = FORMATS[name]
        codes = torch.arange(1 << form.bits, dtype=torch.uint8)[:, None, None].expand(-1, 1, 32).contiguous()
        values = codes.view(torch.float8_e4m3fn if form.is_float else torch.int8) if form.bits == 8 else codes
        scale, least = torch.full((len(codes), 1), 0.5), torch.full((len(codes), 1), -3.0) if form.has_zero else None
        weight = pack(form, values, scale, least)
        out, expected = ops.linear(torch.eye(32, dtype=dtype), weight), dequantize(weight, 32, dtype).T
        assert_same_bits(out.isnan(), expected.isnan())
        assert_same_bits(out.nan_to_num() + 0, expected.nan_to_num() + 0)  # -0 + 0 is 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_does_not_matter(emulated: type[Emulated], dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    x, norm, weight = make.normal(20, 1440), make.norm(1440), packed(make, "int4_zero", 20, 1440)
    expected = emulated().linear(x, weight), *emulated().exit_head(x, norm, weight, EPS)
    for seed, arch in ((1, 80), (2, 90), (3, 90)):
        ops = emulated(seed, arch)
        assert_same_bits((ops.linear(x, weight), *ops.exit_head(x, norm, weight, EPS)), expected, f"with seed {seed}")


def test_unsupported_calls(emulated: type[Emulated]) -> None:
    """The ops name these before they launch; the launchers give CUDA's error."""
    make, ops = Inputs(torch.float32), emulated()
    x, weight, other = make.normal(2, 64), packed(make, "int8", 4, 64), packed(make, "int4", 4, 64)
    for call in (
        lambda: ops.linear(misaligned(x), weight),
        lambda: ops.linear(x, misaligned(weight)),
        lambda: ops.exit_head(x, make.norm(64), misaligned(weight), EPS),
    ):
        with pytest.raises(EmulationError, match="716"):
            call()
    with pytest.raises(EmulationError, match=r"CUDA error 1$"):
        ops.swiglu(x, weight, other)
