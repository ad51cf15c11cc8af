"""GGUF files, read packed: blocks as they are, rows of q and k in transformers' order, other types as int8."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import quantized_checkpoints as layouts
import torch
from gguf import GGMLQuantizationType as Kind

import layerskip
from layerskip.models import ModelFileError, UnsupportedModelError, load
from layerskip.models.adapt import dequantized
from layerskip.models.checkpoints import GgufCheckpoint, build

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = torch.tensor([[3, 7, 12, 5, 40, 9]])
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
HEADS = {"attn_q": 4, "attn_k": 2}


def named(name):
    if name in NAMES:
        return NAMES[name]
    _, _, number, *path, kind = name.split(".")
    return f"blk.{number}.{PARTS['.'.join(path)]}.{kind}"


def permuted(weight, heads):
    """Llama's rows as llama.cpp keeps them: of each head, the two of a rotated pair next to each other."""
    size = len(weight) // heads
    order = [head * size + pair + half for head in range(heads) for pair in range(size // 2) for half in (0, size // 2)]
    return weight[order]


def metadata(writer, model):
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"w{number}" for number in range(config.vocab_size - 2)), "w", "0"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["w 0"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)


def write(path, model, kinds, architecture="llama", extra=()):
    """Write a model, and give the one that has what its blocks mean.

    ``kinds``: the type of a matrix by a part of its name; Q8_0 for others.
    """
    writer = gguf.GGUFWriter(path, architecture)
    metadata(writer, model)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        own, plain = named(name), weight.float()
        kind = next((kind for part, kind in kinds.items() if part in own), Kind.Q8_0) if plain.dim() == 2 else Kind.F32
        blocks = gguf.quants.quantize(plain.numpy(), kind)
        weight.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind))))
        heads = HEADS.get(own.split(".")[-2]) if architecture == "llama" else None
        blocks = blocks if heads is None else permuted(blocks, heads)
        writer.add_tensor(own, np.ascontiguousarray(blocks), raw_dtype=kind)
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def read(path, model, dtype=torch.float32):
    return build("a test", model.config, GgufCheckpoint(path), dtype)


@pytest.mark.parametrize(("kind", "weights"), [(Kind.Q8_0, "int8"), (Kind.Q4_0, "int4"), (Kind.Q4_1, "int4_zero")])
@pytest.mark.parametrize("architecture", ["llama2", "llama3", "qwen2", "qwen3"])
def test_blocks_are_packed_weights(tmp_path, architecture, kind, weights):
    changes = {} if architecture in ("llama2", "qwen2") else {"head_dim": 32}
    model = layouts.tiny(architecture, **changes)
    own = architecture if "qwen" in architecture else "llama"
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
