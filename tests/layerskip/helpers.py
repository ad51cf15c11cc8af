"""Small random Hugging Face models, one for each row of the adapters' table, and what a directory of one needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 101
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Small enough that the long wavelengths are scaled within the 256 positions of these models.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_MIXED = ["sliding_attention", "full_attention"] * 2
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
}

# Name -> configuration class and what it changes in _SIZES. Head sizes 8, 16, 24 and 40; grouped and ungrouped heads;
# tied and untied; H C equal to D and not.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 40, "tie_word_embeddings": True}),
    "smollm2": ("Llama", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1,
                          "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
}  # fmt: skip


# Those whose layers differ more; they have tests of their own.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "phi4mini": ("Phi3", {"hidden_size": 64, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 252,
                          "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None, "tie_word_embeddings": False}),
    "qwen3moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                              "norm_topk_prob": True, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": True}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2,
                            "logits_scaling": 4.0, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {"head_dim": 16, "tie_word_embeddings": False}),
    "olmo3": ("Olmo3", {"head_dim": 16, "sliding_window": 10, "layer_types": _MIXED, "tie_word_embeddings": False,
                        "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}}),
    "gemma3": ("Gemma3Text", {"head_dim": 24, "query_pre_attn_scalar": 40, "sliding_window": 6, "layer_types": _MIXED,
                              "tie_word_embeddings": True}),
}  # fmt: skip


def tiny_config(architecture: str, **changes: Any) -> Any:
    """Configuration of a small model; ``changes`` go over it."""
    name, own = {**ARCHITECTURES, **FAMILIES}[architecture]
    return getattr(transformers, f"{name}Config")(**{**_SIZES, **own, **changes})


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A small random model whose weights are large enough that its tokens vary.

    Only parameters are cast, as `from_pretrained` does: the frequencies of the rotary embedding stay fp32.
    """
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scaled = values * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * values
        parameter.data = scaled.to(dtype)
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def zeroed(cache: Any) -> Any:
    """The cache, filled with zeros: what a new one holds before it is written is anything."""
    cache.k.zero_()
    cache.v.zero_()
    return cache


def tiny_tokenizer(word: str = "w{}") -> Any:
    """Words ``w0`` to ``w100``; w0 is the unknown one, w1 ends a text.

    With such words any text reads back as the tokens that it was made of but for w10 … w19, which begin with a special
    one; with ``w{:03}`` all do.
    """
    words = {word.format(number): number for number in range(VOCABULARY)}
    unknown, end = word.format(0), word.format(1)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, eos_token=end)


def save_tiny(directory: Path, architecture: str = "llama2", max_shard_size: str = "1GB", **changes: Any) -> Path:
    """Write a small model and tokenizer as ``save_pretrained`` does."""
    tiny_model(architecture, **changes).save_pretrained(directory, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory
