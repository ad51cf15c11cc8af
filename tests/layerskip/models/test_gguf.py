"""GGUF files, read packed: blocks as they are, rows of q and k in transformers' order, other types as int8."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import quantized_checkpoints as layouts
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import read, write

import layerskip
from layerskip.models import ModelFileError, UnsupportedModelError, load
from layerskip.models.adaptation import dequantized

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = torch.tensor([[3, 7, 12, 5, 40, 9]])


@pytest.mark.parametrize(("kind", "weights"), [(Kind.Q8_0, "int8"), (Kind.Q4_0, "int4"), (Kind.Q4_1, "int4_zero")])
@pytest.mark.parametrize("architecture", ["llama2", "llama3", "mistral", "qwen2", "qwen3"])
def test_blocks_are_packed_weights(tmp_path, architecture, kind, weights):
    changes = {} if architecture in ("llama2", "qwen2") else {"head_dim": 32}
    model = layouts.tiny(architecture, **changes)
    own = "llama" if "llama" in architecture else architecture
    meant = write(tmp_path / "m.gguf", model, {"": kind}, own)
    made = read(tmp_path / "m.gguf", model)
    assert made.weights == weights
    found, expected = dequantized(made).state_dict(), meant.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_rows_are_copied_as_they_are(tmp_path):
    model = layouts.tiny()
    write(tmp_path / "m.gguf", model, {})
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    made = read(tmp_path / "m.gguf", model)
    assert made.decoder.layer(1).down.numpy().tobytes() == tensors["blk.1.ffn_down.weight"].tobytes()
    assert made.embedding.numpy().tobytes() == tensors["token_embd.weight"].tobytes()


def test_other_types_become_int8_and_floats_stay(tmp_path):
    model = layouts.tiny()
    kinds = {"output.weight": Kind.Q5_0, "token_embd": Kind.F16, "ffn_down": Kind.BF16, "": Kind.Q4_0}
    meant = write(tmp_path / "m.gguf", model, kinds)
    made = read(tmp_path / "m.gguf", model)
    assert made.weights == "float32+int4+int8"
    found = dequantized(made)
    assert torch.equal(found.model.embed_tokens.weight, meant.model.embed_tokens.weight)
    assert torch.equal(found.model.layers[3].mlp.down_proj.weight, meant.model.layers[3].mlp.down_proj.weight)
    error = (found.lm_head.weight - meant.lm_head.weight).abs().amax(1) / meant.lm_head.weight.abs().amax(1)
    assert 0 < error.max() <= 0.5 / 127 * 1.01  # half a step of int8


def test_from_a_path_with_its_tokenizer(tmp_path):
    meant = write(tmp_path / "m.gguf", layouts.tiny(), {"": Kind.Q4_1})
    decoder = layerskip.SelfSpeculativeDecoder.from_pretrained(tmp_path / "m.gguf", dtype=torch.float32, exit_layer=2)
    assert decoder.tokenizer.convert_tokens_to_ids("w7") == 7
    assert decoder.model.config.num_hidden_layers == 4
    out = decoder.generate(PROMPT, 12, eos_token_id=[]).new_tokens
    theirs = meant.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out.tolist() == theirs[:, PROMPT.shape[1] :].tolist()
    with pytest.raises(ValueError, match="has weights of its own format; leave out int8"):
        load(tmp_path / "m.gguf", weights="int8")


def test_a_file_is_parsed_once(tmp_path, monkeypatch):
    """By load, for the weights, the configuration and the tokenizer; loading again reads the file as it is then."""
    parsed, parse = [], gguf.GGUFReader._build_fields

    def counted(reader, *args):
        parsed.append(type(reader.data))
        return parse(reader, *args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counted)
    opening = gguf.GGUFReader
    for layers in (4, 3):
        write(tmp_path / "m.gguf", layouts.tiny(num_hidden_layers=layers), {})
        model, tokenizer = load(tmp_path / "m.gguf")
        assert parsed == [np.ndarray]  # slices of np.memmap are slow
        assert model.config.num_hidden_layers == layers
        assert tokenizer.convert_tokens_to_ids("w7") == 7
        parsed.clear()
    assert gguf.GGUFReader is opening


def test_factors_of_the_rotary_embedding(tmp_path):
    model = layouts.tiny()
    factors = np.linspace(1, 4, model.config.head_dim // 2, dtype=np.float32)
    write(tmp_path / "m.gguf", model, {}, extra=[("rope_freqs.weight", factors)])
    expected = model.model.rotary_emb.inv_freq / torch.from_numpy(factors)
    assert torch.allclose(read(tmp_path / "m.gguf", model).decoder.inv_freq, expected)


class TestRefused:
    def test_a_type_that_cannot_be_read(self, tmp_path, monkeypatch):
        model = layouts.tiny()
        write(tmp_path / "m.gguf", model, {"ffn_up": Kind.Q5_1})

        def dequantize(data, kind):
            raise NotImplementedError

        monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
        with pytest.raises(
            UnsupportedModelError, match=r"blk\.0\.ffn_up\.weight of type Q5_1 is not .*: Q8_0, Q4_0, Q4_1"
        ):
            read(tmp_path / "m.gguf", model)

    def test_a_file_that_does_not_fit(self, tmp_path):
        model = layouts.tiny()
        write(tmp_path / "m.gguf", model, {}, extra=[("blk.0.attn_sinks.weight", np.ones(4, dtype=np.float32))])
        with pytest.raises(ModelFileError, match=r"1 weights that .* does not use, first blk\.0\.attn_sinks\.weight"):
            read(tmp_path / "m.gguf", model)
        with pytest.raises(ModelFileError, match=r"token_embd\.weight has shape \[101, 128\], .* \[90, 128\]"):
            read(tmp_path / "m.gguf", layouts.tiny(vocab_size=90))
        with pytest.raises(ModelFileError, match=r"lacks 9 weights .* first model\.layers\.4"):
            read(tmp_path / "m.gguf", layouts.tiny(num_hidden_layers=5))

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "m.gguf").write_bytes(b"GGUF nonsense")
        with pytest.raises(ModelFileError, match=r"of .*m\.gguf: "):
            load(tmp_path / "m.gguf")
