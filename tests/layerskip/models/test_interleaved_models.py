"""Models whose packed weights were interleaved for the processor: what they decode, save and hand on stays theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_checkpoints as layouts
import torch
from exits_of import copied_exit
from helpers import tiny_model
from test_quantized import wide_model as model_of
from tiny import prompt_of, requires_native

import layerskip
from layerskip import LayerSkipModel, SelfSpeculativeDecoder
from layerskip.models import weight_arena
from layerskip.models.architectures import named_weights
from layerskip.models.loading import save
from layerskip_kernels.formats import is_interleaved, rows_of

FORMATS = ["int8", "int4", "int4_zero"]


def wide_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    """One whose vocabulary is a number of panels."""
    return model_of(dtype, vocab_size=112)


@pytest.fixture(autouse=True)
def panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies panels: the kernels of others take them, too."""
    monkeypatch.setattr(weight_arena, "multiplies_panels", lambda: True)


def gathered(name: str) -> LayerSkipModel:
    model = layerskip.adapt(wide_model()).quantize(name)
    assert layerskip.gather_weights(model) is not None
    assert all(is_interleaved(weight) for weight, _ in model.matrices())
    return model


def test_only_packed_integers_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fp8 = layerskip.adapt(wide_model()), layerskip.adapt(wide_model()).quantize("fp8")
    fp32 = layerskip.adapt(wide_model(torch.float32)).quantize("int8")
    for model in (plain, fp8, fp32):
        layerskip.gather_weights(model)
        assert not any(is_interleaved(weight) for weight, _ in model.matrices())
    monkeypatch.setattr(weight_arena, "multiplies_panels", lambda: False)
    other = layerskip.adapt(wide_model()).quantize("int8")
    layerskip.gather_weights(other)
    assert not any(is_interleaved(weight) for weight, _ in other.matrices())


@pytest.mark.parametrize("vocab_size", [101, 112])
def test_rows_that_are_no_panels_stay_rows(vocab_size: int) -> None:
    """A head of 101 rows stays as it is; the layers do not, whose rows are multiples of sixteen."""
    model = layerskip.adapt(model_of(vocab_size=vocab_size)).quantize("int8")
    layerskip.gather_weights(model)
    *layers, head, embedding = (is_interleaved(weight) for weight, _ in model.matrices())
    assert all(layers)
    assert head == embedding == (vocab_size == 112)


@pytest.mark.parametrize("family", ["llama2", "phi3"])
def test_keys_that_are_no_panels(family: str) -> None:
    """One head of eight does not fill a panel, not even in a matrix that does; then none of the layers lies in any."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 1, "vocab_size": 112}
    model = layouts.tiny(family, dtype=torch.bfloat16, **sizes)
    packed = layerskip.adapt(model).quantize("int8")
    layerskip.gather_weights(packed)
    assert not any(is_interleaved(weight) for weight, _ in packed.matrices()[:-2])
    assert is_interleaved(packed.head.head_weight)


@requires_native
def test_experts_stay_rows(one_thread: None) -> None:
    """Sixteen of them, which might be taken for the rows of a panel."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 16, "num_key_value_heads": 4}
    model = layerskip.adapt(tiny_model("mixtral", torch.bfloat16, **sizes)).quantize("int4")
    prompt = prompt_of(9)
    layerskip.gather_weights(model)
    held = model.decoder.layer_parameters(0)
    assert {name for name in held if is_interleaved(held[name])} == set("qkvo")
    decoder = SelfSpeculativeDecoder(model, 2, 3)
    expected = decoder.generate(prompt, 12, strategy="autoregressive").new_tokens
    assert decoder.generate(prompt, 12).new_tokens.equal(expected)


@requires_native
@pytest.mark.parametrize("name", FORMATS)
def test_lossless(name: str, one_thread: None) -> None:
    model, prompt = gathered(name), prompt_of(9)
    expected = SelfSpeculativeDecoder(model).generate(prompt, max_new_tokens=24, strategy="autoregressive")
    exit = copied_exit(layerskip.adapt(wide_model()), 1, 2)
    for options in ({}, {"draft_head": "int8"}, {"draft_source": "ngram"}, {"exit": exit}):
        own = options if "exit" in options else {"exit_layer": 1, **options}
        decoder = SelfSpeculativeDecoder(model, num_speculations=3, **own)
        assert torch.equal(decoder.generate(prompt, max_new_tokens=24).sequences, expected.sequences)


@requires_native
@pytest.mark.parametrize("in_panels", [True, False])
def test_packed_draft_layers_beside_plain_layers(
    in_panels: bool, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """They are the layers that follow, but for rounding: so nearly every draft is right."""
    monkeypatch.setattr(weight_arena, "multiplies_panels", lambda: in_panels)
    model, prompt = layerskip.adapt(wide_model()), prompt_of(9)
    exit = copied_exit(model, 1, 3)
    exit.token_ids = torch.arange(model.vocab_size)
    decoder = SelfSpeculativeDecoder(model, num_speculations=3, exit=exit)
    kinds = [weight.dtype for weight in decoder.model.decoder.draft_layer_weights if weight.dim() == 2]
    assert kinds == 3 * 7 * [torch.int16 if in_panels else torch.uint8]
    expected = decoder.generate(prompt, 40, strategy="autoregressive")
    out = decoder.generate(prompt, 40)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.stats.acceptance_rate > 0.8


@requires_native
def test_the_reference_decodes_the_same_weights(one_thread: None) -> None:
    """To a rounding: the logits of panels are those of the rows they were."""
    rows, own = layerskip.adapt(wide_model()).quantize("int4"), gathered("int4")
    tokens = prompt_of(40)
    caches = [model.decoder.new_cache(1, 64) for model in (rows, own, own)]
    expected = rows.read(tokens, caches[0])
    torch.testing.assert_close(own.read(tokens, caches[1]), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(own.prefill(tokens, caches[2]), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_scatter_undoes_it(name: str) -> None:
    rows, model = layerskip.adapt(wide_model()).quantize(name), gathered(name)
    layerskip.scatter_weights(model)
    for (expected, _), (found, _) in zip(rows.matrices(), model.matrices(), strict=True):
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected)


def test_gathered_twice() -> None:
    model = gathered("int8")
    before = {name: weight.clone() for name, weight in named_weights(model).items()}
    layerskip.gather_weights(model)
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())


def test_tied_weights_stay_tied() -> None:
    tied = layouts.tiny(dtype=torch.bfloat16, tie_word_embeddings=True, vocab_size=112)
    model = layerskip.adapt(tied).quantize("int8")
    layerskip.gather_weights(model)
    assert is_interleaved(model.embedding)
    assert model.embedding is model.head.head_weight


def test_joined_matrices() -> None:
    """Phi-3 keeps q, k and v in one matrix, of which k is a view."""
    model = layerskip.adapt(layouts.tiny("phi3", dtype=torch.bfloat16)).quantize("int8", release=True)
    rows = {name: weight.clone() for name, weight in named_weights(model).items()}
    layerskip.gather_weights(model)
    assert is_interleaved(model.decoder.layer(0).k)
    widths = {id(weight): width for weight, width in model.matrices()}
    found = {name: rows_of(one, widths.get(id(one), 0)) for name, one in named_weights(model).items()}
    assert all(torch.equal(weight, rows[name]) for name, weight in found.items())
    tokens = SelfSpeculativeDecoder(model, 1, 3).generate(prompt_of(7), 12).new_tokens
    expected = SelfSpeculativeDecoder(model).generate(prompt_of(7), 12, strategy="autoregressive").new_tokens
    assert torch.equal(tokens, expected)


def test_saved_as_rows(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert transformers
    for name, model in (("rows", layerskip.adapt(wide_model()).quantize("int4")), ("panels", gathered("int4"))):
        (tmp_path / name).mkdir()
        save(model, tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("rows", "panels")]
    assert files[0] == files[1]


def test_draft_heads_are_those_of_the_rows() -> None:
    rows, model = layerskip.adapt(wide_model()).quantize("int8"), gathered("int8")
    for chosen in (None, torch.tensor([1, 5, 30])):
        expected, found = rows.head.quantize(chosen), model.head.quantize(chosen)
        assert torch.equal(found.head_weight, expected.head_weight)
        assert torch.equal(found.scale, expected.scale)
