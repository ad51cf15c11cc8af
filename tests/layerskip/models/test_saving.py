"""Models with packed weights on disk: what ``layerskip quantize`` writes, and loading plain weights packed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import quantized_checkpoints as layouts
import torch
from helpers import save_tiny, tiny_tokenizer
from safetensors.torch import load_file, save_file

import layerskip
from layerskip.models import ModelFileError, UnsupportedModelError, adapt, load, save
from layerskip.models.adaptation import dequantized
from layerskip_kernels.formats import FORMATS, dequantize

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = torch.tensor([[3, 7, 12, 5, 40, 9]])


def packed(weights, architecture="llama2", dtype=torch.bfloat16):
    return adapt(layouts.tiny(architecture, dtype=dtype)).quantize(weights)


def same(one, other):
    pairs = list(zip(one.named_parameters(), other.named_parameters(), strict=True))
    return all(a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1]) for a, b in pairs)


def edit(path, **changes):
    content = json.loads(path.read_text())
    content["quantization_config"].update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("weights", FORMATS)
def test_what_is_saved_loads_bit_for_bit(tmp_path, weights):
    model = packed(weights)
    model.generation_config.eos_token_id = 7
    save(model, tmp_path, tiny_tokenizer())
    again, tokenizer = load(tmp_path)
    assert same(model, again)
    packed_as = [weights] if "int4" not in weights else [weights, "int8"]  # embedding and head
    assert again.weights == "+".join(packed_as)
    assert (again.dtype, again.generation_config.eos_token_id, tokenizer("w5").input_ids) == (torch.bfloat16, 7, [5])
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "layerskip", "version": 1, "formats": packed_as}
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()) < sum(
        weight.nbytes for weight in layouts.tiny(dtype=torch.bfloat16).parameters()
    )


def test_frequencies_that_the_configuration_does_not_give(tmp_path):
    """As of a GGUF file of Llama 3.x, which has factors for them."""
    model = packed("int8")
    model.decoder.inv_freq.div_(torch.linspace(1, 4, model.decoder.inv_freq.numel()))
    save(model, tmp_path, tiny_tokenizer())
    torch.testing.assert_close(load(tmp_path)[0].decoder.inv_freq, model.decoder.inv_freq)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral"])
def test_biases_norms_and_ties(tmp_path, architecture):
    changes = {} if architecture == "qwen2" else {"head_dim": 32}
    model = adapt(layouts.tiny(architecture, **changes)).quantize("int4")
    assert (model.embedding is model.head.head_weight) == model.config.tie_word_embeddings
    save(model, tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert same(model, load(tmp_path, torch.float32)[0])


def test_in_several_files(tmp_path):
    model = packed("int8")
    save(model, tmp_path, tiny_tokenizer(), shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert same(model, load(tmp_path)[0])


def test_what_others_packed_is_kept(tmp_path):
    layouts.write(tmp_path / "awq", layouts.tiny(), layouts.awq(32))
    model, tokenizer = load(tmp_path / "awq")
    (tmp_path / "own").mkdir()
    save(model, tmp_path / "own", tokenizer)
    again, _ = load(tmp_path / "own")
    assert same(model, again)
    assert again.weights == "bfloat16+int4_zero"


def test_a_decoder_of_it_is_lossless(tmp_path):
    save(packed("int4"), tmp_path, tiny_tokenizer())
    decoder = layerskip.SelfSpeculativeDecoder.from_pretrained(tmp_path, exit_layer=2)
    plain = decoder.generate(PROMPT, 32, strategy="autoregressive").new_tokens
    assert torch.equal(decoder.generate(PROMPT, 32).new_tokens, plain)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, UnsupportedModelError, "version 2 of quant_method layerskip is not supported"),
        ({"formats": ["int5"]}, UnsupportedModelError, "the weight format 'int5' is not supported; supported: int8"),
        ({"formats": ["int4"]}, ModelFileError, r"embed_tokens\.weight is packed in int8, its config\.json says int4"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, error, message):
    save(packed("int8"), tmp_path, tiny_tokenizer())
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_bytes_that_are_no_format(tmp_path):
    save(packed("int8"), tmp_path, tiny_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:, 1:].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"up_proj\.weight: 135 bytes a row are no format of width 128"):
        load(tmp_path)


class TestPlainWeightsThatAreQuantized:
    @pytest.mark.parametrize("weights", ["int8", "int4_zero_g128"])
    @pytest.mark.parametrize("architecture", ["llama2", "qwen2"])
    def test_as_the_loaded_model_would_be(self, tmp_path, architecture, weights):
        layouts.tiny(architecture, dtype=torch.bfloat16).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        seen = []
        model, _ = load(tmp_path, weights=weights, progress=lambda *done: seen.append(done))
        assert same(model, packed(weights, architecture))
        assert seen[-1] == (len(seen), len(seen))
        plain = dict(layouts.tiny(architecture).named_parameters())["model.layers.2.mlp.down_proj.weight"]
        error = (dequantize(model.decoder.layer(2).down, 256) - plain).norm() / plain.norm()
        assert 0 < error < (0.01 if weights == "int8" else 0.12)

    def test_widths_that_a_format_does_not_take(self, tmp_path):
        save_tiny(tmp_path / "model")  # of 32 and 72
        with pytest.raises(ValueError, match=r"embed_tokens\.weight: int8_g128 takes widths that are multiples of 128"):
            load(tmp_path / "model", weights="int8_g128")
        with pytest.raises(ValueError, match=r"down_proj\.weight: int4 takes .* of 32, got 72"):
            load(tmp_path / "model", weights="int4")

    def test_native_is_as_it_is(self, tmp_path):
        save_tiny(tmp_path / "model")
        assert load(tmp_path / "model", weights="native")[0].config.architectures == ["LlamaForCausalLM"]


def test_dequantized_is_what_the_packed_one_computes():
    for architecture in ("llama2", "llama3", "qwen2"):
        changes = {"head_dim": 32} if architecture == "llama3" else {}
        model = adapt(layouts.tiny(architecture, **changes)).quantize("int4")
        plain = dequantized(model)
        theirs = plain.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0)[:, PROMPT.shape[1] :]
        assert layerskip.SelfSpeculativeDecoder(model, 2).generate(PROMPT, 12).new_tokens.tolist() == theirs.tolist()
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == model.config.tie_word_embeddings


MEASURE = """
import re, sys, torch, layerskip
from layerskip import SelfSpeculativeDecoder
from layerskip.models import load
import transformers, safetensors.torch
# Of this program alone: getrusage counts what its parent had before it became it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
load(sys.argv[2], weights=sys.argv[3])  # a small one, so that all code is there
before = peak()
decoder = SelfSpeculativeDecoder.from_pretrained(sys.argv[1], weights=None if sys.argv[3] == "packed" else sys.argv[3])
held = sum(weight.nbytes for weight in set(decoder.model.parameters()))
print(peak() - before, held)
"""
SLACK = 96_000_000
"""Bytes beyond the packed model: one plain weight (here 50 MB at most), what packs 2 million of its numbers at a time
(in fp32, some ten times over), and what the allocator keeps."""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_loading_never_holds_the_plain_model(tmp_path, weights):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 24576, "num_hidden_layers": 12}
    big = layouts.tiny(dtype=torch.bfloat16, **sizes, num_attention_heads=16, num_key_value_heads=8)
    plain = sum(weight.nbytes for weight in big.parameters())
    for directory, model in (("big", big), ("small", layouts.tiny(dtype=torch.bfloat16))):
        model.save_pretrained(tmp_path / directory)
        tiny_tokenizer().save_pretrained(tmp_path / directory)
    del big
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path / "small"), weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, held = map(int, done.stdout.split())
    print(f"plain {plain / 1e6:.0f} MB, {weights} {held / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB more than before")
    assert held < plain * (0.54 if weights == "int8" else 0.36)
    assert 0.9 * held < peak < held + SLACK < plain
