"""Tiny random models of every architecture, whose early exits are as good as a test wants them."""

from __future__ import annotations

import pytest
import torch
import transformers

import layerskip_kernels

VOCAB, LAYERS = 101, 4
CONFIGS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
# What the layers from the first exit on add to the state: all of it, little (some drafts are accepted), nothing (all are).
UPPER = {"random": 1.0, "weak": 0.15, "silent": 0.0}


def _native_missing() -> str | None:
    try:
        layerskip_kernels.cpu_isa()
    except RuntimeError as error:
        return str(error)
    return None


requires_native = pytest.mark.skipif(
    _native_missing() is not None, reason=f"the reference is not bitwise batch invariant; {_native_missing()}"
)


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, upper: str = "random", seed: int = 0
) -> transformers.PreTrainedModel:
    """A model of 4 layers; those from layer 1 on are scaled by ``UPPER[upper]``."""
    make_config, make_model = CONFIGS[architecture]
    extra = {"sliding_window": None} if architecture == "mistral" else {}
    config = make_config(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=72, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=192, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=None, pad_token_id=None, **extra,
    )  # fmt: skip
    model = make_model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if "norm" in name else noise * 0.2
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            weight.data *= UPPER[upper]
    return model.to(dtype)


def prompt_of(length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [1, length]."""
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
