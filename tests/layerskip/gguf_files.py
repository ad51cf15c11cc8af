"""GGUF files of tiny models."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from layerskip.models.adaptation import build
from layerskip.models.checkpoints.gguf import GgufCheckpoint

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
PERMUTED = ("llama", "mistral")  # whose rows of q and k llama.cpp reorders


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


def write(path, model, kinds, architecture="llama", extra=(), changes=()):
    """Write a model, and give the one that has what its blocks mean.

    ``kinds``: the type of a matrix by a part of its name; Q8_0 for others. ``changes``: values of metadata by name,
    None to leave a field out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    metadata(writer, model)
    for name, value in dict(changes).items():
        writer.kv_data[0].pop(name, None)
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    heads_of = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        own, plain = named(name), weight.float()
        kind = next((kind for part, kind in kinds.items() if part in own), Kind.Q8_0) if plain.dim() == 2 else Kind.F32
        blocks = gguf.quants.quantize(plain.numpy(), kind)
        weight.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind))))
        heads = heads_of.get(own.split(".")[-2]) if architecture in PERMUTED else None
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
