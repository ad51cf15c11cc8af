"""Rounding that considers the inputs: a smaller output error, and an ordinary packed weight."""

from __future__ import annotations

import pytest
import quantized_checkpoints as layouts
import torch

from layerskip.models import adapt
from layerskip.models.adaptation import dequantized
from layerskip.models.generic_layers import INPUTS
from layerskip.models.quantize import rounded
from layerskip_kernels.formats import FORMATS, dequantize, fit, format_of, quantize

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(rows, width, seed=0):
    """States with few directions, as those of models are, of channels that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, width // 8, generator=generator) @ torch.randn(width // 8, width, generator=generator)
    return (few + 0.3 * torch.randn(rows, width, generator=generator)) * torch.linspace(0.2, 3, width)


@pytest.mark.parametrize("weights", FORMATS)
def test_outputs_lose_less_than_rounded_to_nearest(weights):
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    seen, other = inputs(600, 256), inputs(600, 256, seed=0)[300:]
    nearest = quantize(weight, weights)
    packed = rounded(weight, seen.T @ seen, weights)
    assert packed.shape == nearest.shape
    assert format_of(packed, 256).name == weights
    errors = [(other @ (dequantize(one, 256) - weight).T).norm() for one in (packed, nearest)]
    assert errors[0] < 0.75 * errors[1]


def test_later_groups_make_up_for_earlier_ones():
    """So more is lost where nothing is known of what the inputs of two groups have in common."""
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    seen = inputs(600, 256)
    whole = seen.T @ seen
    apart = torch.block_diag(*(whole[first : first + 32, first : first + 32] for first in range(0, 256, 32)))
    errors = [(seen @ (dequantize(rounded(weight, one, "int4"), 256) - weight).T).norm() for one in (whole, apart)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("weights", ["int8", "int4", "int4_zero", "fp8"])
def test_inputs_that_say_nothing_leave_rounding_to_nearest(weights):
    """Where H is a multiple of the identity no column can make up for another."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rounded(weight, 7 * torch.eye(128), weights), quantize(weight, weights))
    assert torch.isfinite(dequantize(rounded(weight, torch.zeros(128, 128), weights), 128)).all()


def test_important_weights_choose_the_scale():
    groups = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(3))
    importance = torch.ones(32)
    importance[5] = 1000
    for form in (FORMATS["int4"], FORMATS["int4_zero"]):
        errors = []
        for given in (None, importance):
            values, scale, *least = fit(form, groups, given)
            meant = (values - form.offset) * scale[..., None] + (least[0][..., None] if least else 0)
            errors.append(((meant - groups)[..., 5] ** 2).sum())
        assert errors[1] < errors[0]


def test_a_model_that_is_calibrated_is_nearer_to_itself():
    model = adapt(layouts.tiny())
    texts = [torch.arange(90).roll(7 * number) for number in range(4)]
    ids = torch.stack([text.roll(3) for text in texts])
    seen = []
    with torch.no_grad():
        expected = dequantized(model)(ids).logits
        errors = [
            (dequantized(model.quantize("int4", calibration=given))(ids).logits - expected).norm()
            for given in (texts, ())
        ]
    assert errors[0] < 0.9 * errors[1]
    packed = model.quantize("int4", calibration=texts[:1], progress=lambda *done: seen.append(done))
    assert packed.weights == "int4+int8"
    assert seen == [(number, 30) for number in range(1, 31)]


@torch.no_grad()
def test_a_layer_is_packed_for_what_the_packed_ones_before_it_give():
    """In all texts."""
    model, texts = adapt(layouts.tiny()), [torch.arange(40).roll(7 * number) for number in range(2)]
    packed, plain = model.quantize("int4", calibration=texts).decoder, model.decoder
    moments = {}

    def add(name, states):
        rows = states.flatten(0, -2)
        moments[name] = moments.get(name, 0) + rows.T @ rows

    for text in texts:
        cache = packed.new_cache(1, len(text))
        states = packed.prefill(model.embed(text[None]), cache, 0, 1)
        plain.prefill_layer(1, plain.layer(1), states, cache, 0, add)
    matrices = {name: weight for name, weight in plain.layer_parameters(1).items() if name in INPUTS}
    assert matrices
    for name, weight in matrices.items():
        assert torch.equal(packed.layer_parameters(1)[name], rounded(weight, moments[INPUTS[name]], "int4"))


def test_release_frees_each_weight():
    plain = layouts.tiny()
    adapt(plain).quantize("int4", release=True, calibration=[torch.arange(20)])
    assert all(weight.numel() == 0 for name, weight in plain.named_parameters() if weight.dim() == 2)
