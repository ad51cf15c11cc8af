"""Packed weights whose rows lie in panels of sixteen: the same numbers in another order, for every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels import formats
from layerskip_kernels.formats import FORMATS
from layerskip_kernels.reference import linear_ref, swiglu_ref
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, has_native

from . import examples
from .common import (
    DTYPES,
    MANY_ROWS,
    TOLERANCES,
    Inputs,
    assert_as_good_as,
    assert_rows_alone,
    assert_same_bits,
    assert_threads_agree,
    run,
)
from .examples import EPS, example
from .test_formats import (
    CASES,
    MATRICES,
    assert_one_call_has_the_bits_of_its_parts,
    copied,
    random_packed,
)

INTEGERS = [name for name, form in FORMATS.items() if not form.is_float]
WIDE = [(name, width) for name, width in CASES if name in INTEGERS]


def interleaved(name: str, rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight as rows and as panels."""
    weight = random_packed(name, rows, width, seed)
    return weight, formats.interleave(weight, width)


@pytest.fixture(params=["native", "torch"])
def path_of_interleave(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, and what serves without one."""
    if request.param == "torch":
        monkeypatch.setattr(formats, "_has_native", lambda op: False)
    elif not has_native("interleave", "CPU"):
        pytest.skip("the library was not built")


@pytest.mark.usefixtures("path_of_interleave")
@pytest.mark.parametrize(("name", "width"), WIDE)
def test_every_byte_of_a_panel(name: str, width: int) -> None:
    """As the head of `formats` describes them, written with loops."""
    form, (weight, panels) = FORMATS[name], interleaved(name, 32, width)
    found = panels.view(torch.uint8).view(2, -1).tolist()
    groups = weight.view(32, -1, form.group_bytes).tolist()
    for panel in range(2):
        own = groups[panel * 16 : panel * 16 + 16]
        numbers = range(width // form.group_size)
        headers = [
            byte for g in numbers for at in range(0, form.header, 2) for row in own for byte in row[g][at : at + 2]
        ]
        columns = [
            byte ^ (128 if form.bits == 8 else 0)
            for g in numbers
            for at in range(form.header, form.group_bytes, 4)
            for row in own
            for byte in row[g][at : at + 4]
        ]
        assert found[panel] == headers + columns


@pytest.mark.parametrize(("name", "width"), WIDE)
def test_interleaving_round_trip(name: str, width: int) -> None:
    weight, panels = interleaved(name, 48, width)
    assert panels.dtype == torch.int16
    assert formats.format_of(panels, width).name == name
    assert_same_bits(formats.rows_of(panels, width), weight)
    assert formats.rows_of(weight, width) is weight
    assert_same_bits(formats.dequantize(panels, width), formats.dequantize(weight, width))
    index = torch.tensor([[40, 0], [16, 15]])
    expected = formats.lookup(weight, index, width, torch.bfloat16)
    assert_same_bits(formats.lookup(panels, index, width, torch.bfloat16), expected)


def test_interleaving_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, panels = interleaved("int4", 80, 96)
    monkeypatch.setattr(formats, "_has_native", lambda op: False)
    monkeypatch.setattr(formats, "_AT_ONCE", 40 * weight.shape[1])  # two panels
    out = torch.zeros_like(panels)
    assert formats.interleave(weight, 96, out) is out
    assert_same_bits(out, panels)
    assert_same_bits(formats.rows_of(panels, 96), weight)  # forty rows, twice


def test_unsupported_interleaving() -> None:
    weight, panels = interleaved("int8", 16, 64)
    for wrong in (panels, weight[:15], random_packed("fp8", 16, 64), torch.zeros(16, 64)):
        assert not formats.can_interleave(wrong, 64)
        with pytest.raises(ValueError, match="cannot interleave"):
            formats.interleave(wrong, 64)


def test_wrong_panels_are_refused(path: str) -> None:
    x, (weight, panels) = torch.zeros(2, 64), interleaved("int8", 32, 64)
    with pytest.raises(ValueError, match="weight is interleaved and has 24 rows, expected a multiple of 16"):
        lk.linear(x, panels[:24])
    with pytest.raises(ValueError, match="70 bytes a row are no format of width 64"):
        lk.linear(x, torch.zeros(16, 35, dtype=torch.int16))
    with pytest.raises(ValueError, match="no format of width 64"):  # the bytes of fp8
        lk.linear(x, torch.zeros(16, 36, dtype=torch.int16))
    with pytest.raises(ValueError, match="all or none interleaved"):
        lk.swiglu(x, panels, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "width"), WIDE)
def test_linear(path: str, name: str, width: int, dtype: torch.dtype) -> None:
    make = Inputs(dtype)
    weight, panels = interleaved(name, 80, width)
    plain = formats.dequantize(weight, width, dtype)
    for rows in (*range(1, 14), *MANY_ROWS):
        x, bias, residual = make.normal(rows, width), make.normal(80), make.normal(rows, 80)
        truth = linear_ref(x.double(), weight, bias.double(), residual.double())
        assert_as_good_as(lk.linear(x, panels, bias, residual), F.linear(x, plain, bias) + residual, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "width"), WIDE)
def test_swiglu(path: str, name: str, width: int, dtype: torch.dtype) -> None:
    x, (gate, own_gate), (up, own_up) = (
        Inputs(dtype).normal(9, width), interleaved(name, 48, width), interleaved(name, 48, width, 1)
    )  # fmt: skip
    a, b = (F.linear(x, formats.dequantize(one, width, dtype)) for one in (gate, up))
    truth = swiglu_ref(x.double(), gate, up)
    assert_as_good_as(lk.swiglu(x, own_gate, own_up), F.silu(a) * b, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INTEGERS)
def test_rows_alone(isa: str, name: str, dtype: torch.dtype) -> None:
    """A row's bits do not depend on how many rows, or threads, there are."""
    x, (_, panels) = Inputs(dtype).normal(61, 128), interleaved(name, 80, 128)
    assert_rows_alone(lambda rows: lk.linear(rows, panels), x)
    assert_threads_agree(lambda: lk.linear(x, panels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INTEGERS)
def test_nan_stays_in_its_row(path: str, name: str, dtype: torch.dtype) -> None:
    x, (_, panels) = Inputs(dtype).normal(8, 128), interleaved(name, 32, 128)
    whole = lk.linear(x, panels)
    for row, value in ((2, float("nan")), (5, float("inf"))):
        x[row, 77] = value
    out = lk.linear(x, panels)
    sound = [0, 1, 3, 4, 6, 7]
    assert not out[2].isfinite().any()
    assert not out[5].isfinite().all()
    torch.testing.assert_close(out[sound], whole[sound])


@pytest.mark.parametrize("highest", [True, False])
@pytest.mark.parametrize("name", INTEGERS)
def test_the_largest_sums(isa: str, name: str, highest: bool) -> None:
    """Of a group whose values are all at an end, and activations that are all the largest: no integer overflows."""
    form, width = FORMATS[name], 512
    least, most = (-128, 127) if form.bits == 8 else (0, 15)
    groups = torch.full((16, width // form.group_size, form.group_size), most if highest else least)
    values = groups.to(torch.int8 if form.bits == 8 else torch.uint8)
    scale = torch.ones(values.shape[:2])
    weight = formats.pack(form, values, scale, -8 * scale if form.has_zero else None)
    x = torch.full((3, width), 2.0, dtype=torch.bfloat16)
    x[1] *= -1
    expected = linear_ref(x.double(), weight)
    found = lk.linear(x, formats.interleave(weight, width)).double()
    assert float((found - expected).abs().max() / expected.abs().max()) < 2**-8


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_the_size_of_a_row_does_not_matter(isa: str, scale: float) -> None:
    x, (weight, panels) = Inputs(torch.bfloat16).normal(3, 128), interleaved("int8", 32, 128)
    small = (x.float() * scale).to(torch.bfloat16)
    truth = linear_ref(small.double(), weight)
    error = (lk.linear(small, panels).double() - truth).abs().max()
    assert error <= max(2.0**-8 * float(truth.abs().max()), 1e-35)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INTEGERS)
def test_plain_by_the_native_kernel(isa: str, name: str, dtype: torch.dtype) -> None:
    weight, panels = interleaved(name, 48, 256)
    assert_same_bits(formats.plain(panels, 256, dtype), formats.dequantize(weight, 256, dtype))


@pytest.fixture
def even_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such that every matrix may lie in panels."""
    for letter, size in (("F", 32), ("V", 48)):
        monkeypatch.setitem(examples.SIZES, letter, size)


def panel_example(op: str, dtype: torch.dtype, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The example of an op with packed layers, embedding and head, as rows and as panels."""
    args = example(op, dtype)
    rows, panels = dict(args), dict(args)

    def packed(weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        count, width = weight.shape
        return interleaved(name, count, width, seed)

    count = len(REQUIRED_WEIGHTS)
    pairs = [
        packed(weight, index) if REQUIRED_WEIGHTS[index % count] in MATRICES else (weight, weight)
        for index, weight in enumerate(args.get("weights", ()))
    ]
    rows["weights"], panels["weights"] = [one for one, _ in pairs], [one for _, one in pairs]
    for key in ("embedding", "head_weight"):
        if key in args:
            rows[key], panels[key] = packed(args[key], 100)
    more = {"scale": None} if "scale" in args else {}
    return rows | more, panels | more


@pytest.mark.parametrize("name", ["int8", "int4", "int4_zero"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_forward(isa: str, name: str, dtype: torch.dtype, even_sizes: None) -> None:
    """As rows give it, but for rounding."""
    rows, panels = panel_example("partial_forward", dtype, name)
    assert sum(weight.dtype == torch.int16 for weight in panels["weights"]) == 14  # of two layers
    expected, found = (run("partial_forward", **copied(args)).double() for args in (rows, panels))
    assert float((found - expected).norm() / expected.norm()) < 16 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4", "int4_zero"])
@pytest.mark.parametrize("op", ["draft", "speculative_round"])
def test_one_call_has_the_bits_of_its_parts(isa: str, op: str, name: str, dtype: torch.dtype, even_sizes: None) -> None:
    assert_one_call_has_the_bits_of_its_parts(op, panel_example(op, dtype, name)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["draft", "speculative_round"])
def test_draft_layers_in_panels_beside_plain_layers(isa: str, op: str, dtype: torch.dtype, even_sizes: None) -> None:
    args = examples.with_draft_layers(example(op, dtype), 2)
    count, weights = len(REQUIRED_WEIGHTS), list(args["weights"])
    for index in range(len(weights) - 2 * count, len(weights)):
        if REQUIRED_WEIGHTS[index % count] in MATRICES:
            weights[index] = interleaved("int8", *weights[index].shape, index)[1]
    assert_one_call_has_the_bits_of_its_parts(op, {**args, "weights": weights})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4", "int4_zero"])
def test_exit_head(path: str, name: str, dtype: torch.dtype) -> None:
    """A vocabulary of 2576 is cut into tiles of 32 rows, not of 24."""
    make, vocab_size = Inputs(dtype), 2576
    weight, panels = interleaved(name, vocab_size, 64)
    hidden, norm = make.normal(7, 64), make.norm(64)
    logits = torch.empty(7, vocab_size)
    out = lk.exit_head(hidden, norm, panels, EPS, logits=logits)
    assert_same_bits(out.token, logits.argmax(1))
    normed = F.rms_norm(hidden.double(), (64,), norm.double(), EPS)
    eager = F.linear(normed.to(dtype), formats.dequantize(weight, 64, dtype))
    assert_as_good_as(logits, eager.float(), normed @ formats.dequantize(weight, 64, torch.float64).T, dtype)
