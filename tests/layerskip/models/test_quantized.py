"""Models with packed weights: what they decode is their own full depth's, to the bit."""

from __future__ import annotations

import gc
from typing import Any

import helpers
import pytest
import torch
from exits_of import copied_exit
from tiny import UPPER, prompt_of, requires_native, tiny_model

import layerskip
from layerskip import LayerSkipModel, SelfSpeculativeDecoder
from layerskip.decoding.adaptive import Sizes
from layerskip.models.quantize import MATRICES
from layerskip_kernels.formats import FORMATS, dequantize, format_of, is_packed

FORMATS_OF_32 = [name for name, one in FORMATS.items() if one.group_size == 32]


def wide_model(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A tiny model whose widths are multiples of 32, and whose exits agree with it now and then."""
    model = helpers.tiny_model("llama2", dtype, intermediate_size=96, **changes)
    for layer in model.model.layers[1:]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= UPPER["weak"]
    return model


@pytest.fixture
def model() -> LayerSkipModel:
    return layerskip.adapt(wide_model())


@pytest.mark.parametrize("name", FORMATS_OF_32)
def test_every_matrix_is_packed(model: LayerSkipModel, name: str) -> None:
    packed = model.quantize(name)
    assert packed.dtype == torch.bfloat16
    assert packed.vocab_size == model.vocab_size
    size = model.decoder.hidden_size
    for number in range(model.num_layers):
        layer, plain = packed.decoder.layer_parameters(number), model.decoder.layer_parameters(number)
        matrices = layer.keys() & set(MATRICES)
        assert len(matrices) == 7
        for matrix in matrices:
            assert format_of(layer[matrix], plain[matrix].shape[1]).name == name
        assert layer["attn_norm"] is plain["attn_norm"]
    for weight in (packed.embedding, packed.head.head_weight):
        assert format_of(weight, size).name == ("int8" if FORMATS[name].bits == 4 else name)
    assert not is_packed(model.embedding)


@requires_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS_OF_32)
def test_lossless(name: str, dtype: torch.dtype, one_thread: None) -> None:
    """Greedy, with the model's head, an int8 one, and look-ups: what the packed model says by itself."""
    packed = layerskip.adapt(wide_model(dtype)).quantize(name)
    prompt = prompt_of(9)
    expected = SelfSpeculativeDecoder(packed).generate(prompt, max_new_tokens=24, strategy="autoregressive")
    for options in ({}, {"draft_head": "int8"}, {"draft_source": "ngram"}):
        decoder = SelfSpeculativeDecoder(packed, exit_layer=1, num_speculations=3, **options)
        assert torch.equal(decoder.generate(prompt, max_new_tokens=24).sequences, expected.sequences)


@requires_native
def test_sessions_and_long_prompts(one_thread: None) -> None:
    packed = layerskip.adapt(wide_model()).quantize("int8")
    decoder = SelfSpeculativeDecoder(packed, exit_layer=1, num_speculations=3)
    prompts = [prompt_of(length, seed=length)[0] for length in (3, 90, 41)]
    session = decoder.open_session(2)
    ids = [session.add(prompt, 10) for prompt in prompts]
    texts: dict[int, list[int]] = {}
    while len(session):
        for update in session.step():
            texts.setdefault(update.request_id, []).extend(update.tokens)
    for request, prompt in zip(ids, prompts, strict=True):
        alone = decoder.generate(prompt[None], max_new_tokens=10).new_tokens[0].tolist()
        assert texts[request] == alone


@pytest.mark.parametrize("name", FORMATS_OF_32)
def test_prompts_by_torch_are_near(name: str, one_thread: None) -> None:
    packed = layerskip.adapt(wide_model(torch.float32)).quantize(name)
    tokens = prompt_of(20)
    caches = [packed.decoder.new_cache(1, 32) for _ in range(2)]
    torch.testing.assert_close(packed.prefill(tokens, caches[0]), packed.read(tokens, caches[1]), rtol=1e-4, atol=1e-4)


def test_the_draft_head_of_a_packed_head(model: LayerSkipModel) -> None:
    packed = model.quantize("int8")
    rows = torch.tensor([1, 5, 7])
    head = packed.head.quantize(rows)
    assert head.scale is not None
    expected = dequantize(packed.head.head_weight[rows], model.decoder.hidden_size)
    found = head.head_weight.float() * head.scale[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 127)


def test_release_frees_the_plain_weights() -> None:
    hf_model = wide_model()
    kept = layerskip.adapt(wide_model()).quantize("int8")
    packed = layerskip.adapt(hf_model).quantize("int8", release=True)
    gc.collect()
    matrices = [one for name, one in hf_model.named_parameters() if one.dim() == 2 or one.numel() == 0]
    assert matrices
    assert all(one.numel() == 0 for one in matrices)
    assert torch.equal(packed.embedding, kept.embedding)


def test_the_bytes_that_costs_are_told(model: LayerSkipModel) -> None:
    """A packed model's layers on the average, and draft layers in their own, plain format."""
    packed = model.quantize("int8")
    decoder = SelfSpeculativeDecoder(packed, exit=copied_exit(model, 1, 2))
    sizes = Sizes.of(decoder.model)
    layer = sum(weight.nbytes for weight in packed.decoder.layer_weights(0, 1))
    plain = sum(weight.nbytes for weight in model.decoder.layer_weights(1, 3))
    assert (sizes.layer, sizes.num_draft_layers) == (layer, 2)
    assert sizes.draft_head == packed.head.head_weight.nbytes + plain


def test_refusals(model: LayerSkipModel) -> None:
    with pytest.raises(ValueError, match="unknown weight format 'int3'"):
        model.quantize("int3")
    with pytest.raises(ValueError, match="packed already"):
        model.quantize("int8").quantize("int8")
    with pytest.raises(ValueError, match="down of the layers: int8 takes widths that are multiples of 32, got 72"):
        layerskip.adapt(tiny_model()).quantize("int8")
    broken = wide_model()
    broken.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="row 3 of the weight to quantize holds NaN"):
        layerskip.adapt(broken).quantize("int8")
    with pytest.raises(ValueError, match="layer 2: up: row 3 of the weight to quantize holds NaN"):
        layerskip.adapt(broken).quantize("int8", release=True)
    assert all(one.numel() for one in broken.parameters())  # nothing was freed
