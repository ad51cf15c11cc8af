"""What ``layerskip quantize`` writes, loaded by transformers: one copy of packed weights for its steps and ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import quantized_checkpoints as layouts
import torch
import transformers
from held_models import generated
from helpers import tiny_tokenizer

import layerskip
from layerskip import SelfSpeculativeDecoder, UnsupportedModelError, adapt, gather_weights
from layerskip.models import load, save, weight_arena
from layerskip.models.adaptation import dequantized
from layerskip.transformers.packed import PackedEmbedding, PackedLinear
from layerskip_kernels.formats import FORMATS

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = torch.tensor([[3, 7, 12, 5, 40, 9]])
LONG = torch.arange(2, 42)[None]  # more rows than the ops take
OURS = {"custom_generate": layerskip.generate, "exit_layer": 2, "num_speculations": 3, "max_new_tokens": 16}
FAMILIES = {
    "llama3": {"head_dim": 32},
    "qwen2": {},
    "phi3": {},
    "granite": {},
    "gemma3": {"head_dim": 32},
}


def written(directory, weights="int4", architecture="llama2", **changes):
    """A directory as ``layerskip quantize`` writes it."""
    directory.mkdir(exist_ok=True)
    save(adapt(layouts.tiny(architecture, **changes)).quantize(weights), directory, tiny_tokenizer())
    return directory


def loaded(directory, dtype=torch.float32):
    """By transformers; every weight of the files has found its place."""
    options = {"dtype": dtype, "output_loading_info": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    assert not any(info.values()), info
    return model


def decoded(directory):
    decoder = SelfSpeculativeDecoder.from_pretrained(directory, dtype=torch.float32, exit_layer=2, num_speculations=3)
    return decoder.generate(PROMPT, 16).new_tokens[0].tolist()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("weights", FORMATS)
def test_every_format(tmp_path, weights):
    model = loaded(written(tmp_path, weights))
    truth = dequantized(load(tmp_path, torch.float32)[0])
    for tokens in (PROMPT, LONG):
        torch.testing.assert_close(logits(model, tokens), logits(truth, tokens), atol=1e-3, rtol=1e-3)
    assert generated(model, PROMPT, **OURS) == decoded(tmp_path)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 4 * 7 + 1
    assert isinstance(model.model.embed_tokens, PackedEmbedding)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_families(tmp_path, architecture):
    """Biases, ties, joined matrices, and an embedding with a factor."""
    model = loaded(written(tmp_path, "int8", architecture, **FAMILIES[architecture]))
    truth = dequantized(load(tmp_path, torch.float32)[0])
    torch.testing.assert_close(logits(model, PROMPT), logits(truth, PROMPT), atol=1e-3, rtol=1e-3)
    assert generated(model, PROMPT, **OURS) == decoded(tmp_path)
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_one_copy(tmp_path):
    model = loaded(written(tmp_path))
    adapted = adapt(model)
    layer, theirs = adapted.decoder.layer(1), model.model.layers[1]
    pairs = [
        (layer.q, theirs.self_attn.q_proj.weight),
        (layer.down, theirs.mlp.down_proj.weight),
        (layer.attn_norm, theirs.input_layernorm.weight),
        (adapted.embedding, model.model.embed_tokens.weight),
        (adapted.head.head_weight, model.lm_head.weight),
    ]
    assert all(own is weight for own, weight in pairs)
    assert adapted.weights == "int4+int8"
    gather_weights(model)
    assert generated(model, PROMPT, **OURS) == decoded(tmp_path)


def test_in_bf16(tmp_path):
    """As the directory says, where nothing else is said."""
    model = transformers.AutoModelForCausalLM.from_pretrained(written(tmp_path))
    assert model.model.norm.weight.dtype == model.model.embed_tokens(PROMPT).dtype == torch.float32
    model = loaded(tmp_path, torch.bfloat16)
    assert model.model.embed_tokens(PROMPT).dtype == logits(model, PROMPT).dtype == torch.bfloat16
    expected = SelfSpeculativeDecoder(load(tmp_path)[0], exit_layer=2).generate(PROMPT, 16).new_tokens
    assert generated(model, PROMPT, **OURS) == expected[0].tolist()


def test_factors_of_the_frequencies(tmp_path):
    """As of a GGUF file of Llama 3.x."""
    packed = adapt(layouts.tiny()).quantize("int8")
    packed.decoder.inv_freq.div_(torch.linspace(1, 4, packed.decoder.inv_freq.numel()))
    save(packed, tmp_path, tiny_tokenizer())
    model = loaded(tmp_path)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, packed.decoder.inv_freq)
    torch.testing.assert_close(adapt(model).decoder.inv_freq, packed.decoder.inv_freq)
    assert generated(model, PROMPT, **OURS) == decoded(tmp_path) == generated(model, PROMPT, max_new_tokens=16)


def test_gathering_keeps_the_order_that_transformers_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_arena, "multiplies_panels", lambda: True)
    model = loaded(written(tmp_path / "a", vocab_size=112), torch.bfloat16)
    own = adapt(model)
    gather_weights(own)
    assert own.embedding.dtype == own.decoder.layer(0).q.dtype == torch.uint8
    assert adapt(model).embedding is own.embedding
    model.save_pretrained(tmp_path / "b")
    tiny_tokenizer().save_pretrained(tmp_path / "b")
    one, other = load(tmp_path / "a")[0], load(tmp_path / "b")[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    gather_weights(one)
    assert one.embedding.dtype == one.decoder.layer(0).q.dtype == torch.int16


def test_saved_again(tmp_path):
    model = loaded(written(tmp_path / "a", architecture="qwen2"))
    model.save_pretrained(tmp_path / "b")
    tiny_tokenizer().save_pretrained(tmp_path / "b")
    one, other = load(tmp_path / "a")[0], load(tmp_path / "b")[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.weights == other.weights == "int4+int8"


def test_in_several_files(tmp_path):
    save(adapt(layouts.tiny()).quantize("int8"), tmp_path, tiny_tokenizer(), shard_bytes=100_000)
    assert generated(loaded(tmp_path), PROMPT, **OURS) == decoded(tmp_path)


def test_accelerated(tmp_path):
    model = loaded(written(tmp_path))
    expected = logits(model, PROMPT)
    layerskip.accelerate(model)
    assert {"FusedRMSNorm", "FusedSwiGLU", "PackedLinear"} <= {type(module).__name__ for module in model.modules()}
    torch.testing.assert_close(logits(model, PROMPT), expected, atol=1e-4, rtol=1e-4)
    assert generated(model, PROMPT, **OURS) == decoded(tmp_path)


def test_gradients_reach_the_input(tmp_path):
    """The ops have none, and a product without one would train nothing in silence."""
    module = loaded(written(tmp_path)).model.layers[0].mlp.up_proj
    states = torch.randn(3, 128, requires_grad=True)
    module(states).sum().backward()
    plain = dequantized(load(tmp_path, torch.float32)[0]).model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(states.grad, plain.sum(0).expand(3, -1))


def test_no_rows(tmp_path):
    module = loaded(written(tmp_path)).model.layers[0].mlp.up_proj
    assert module(torch.empty(2, 0, 128)).shape == (2, 0, 256)


class TestRefused:
    def test_another_version(self, tmp_path):
        path = written(tmp_path) / "config.json"
        path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
        with pytest.raises(UnsupportedModelError, match="version 2 of quant_method layerskip"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_bytes_that_are_no_format(self, tmp_path):
        path = written(tmp_path, "int8") / "config.json"
        path.write_text(path.read_text().replace('"hidden_size": 128', '"hidden_size": 160'))
        with pytest.raises(ValueError, match=r"\S+\.weight: \d+ bytes a row are no format of width 160"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_quantizing_as_it_loads(self, tmp_path):
        layouts.tiny().save_pretrained(tmp_path)
        from layerskip.transformers.quantizer import LayerSkipConfig

        config = LayerSkipConfig(version=1, formats=["int8"])
        with pytest.raises(ValueError, match="layerskip does require the model to be pre-quantized"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


LOAD = "model = transformers.AutoModelForCausalLM.from_pretrained({!r}); print(type(model.lm_head).__name__)"


@pytest.mark.parametrize("first", ["layerskip", "transformers.quantizers.auto"])
def test_one_import_is_enough(tmp_path, first):
    lines = ["import sys", f"import {first}", "import layerskip", "import transformers"]
    if first == "layerskip":
        lines.insert(3, "assert 'torch' not in sys.modules")
    run = [sys.executable, "-c", "\n".join([*lines, LOAD.format(str(written(tmp_path)))])]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PackedLinear", done.stderr
