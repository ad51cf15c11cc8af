"""Models of the families whose layers differ from Llama's, and what tests compare of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import FAMILIES, tiny_model
from tiny import UPPER

EVERY = pytest.mark.parametrize("family", list(FAMILIES))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Of the largest logit: the same sums in another order, through 4 layers; 3e-6 seen.
TOLERANCE = 6e-6


def weak(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose first layer drafts well enough that some drafts are accepted."""
    model = tiny_model(family, dtype, seed, tie_word_embeddings=False)
    for layer in model.model.layers[1:]:
        named = dict(layer.named_parameters())
        if "post_feedforward_layernorm.weight" in named:  # what is before a norm has no scale
            kept_less = 1.0 if family == "gemma3" else 0.0
            for name in ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"):
                named[name].data = (named[name].data + kept_less) * UPPER["weak"] - kept_less
            continue
        for name, weight in named.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                weight.data *= UPPER["weak"]
    return model


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Of the head of an adapted model."""
    out = torch.empty(hidden.shape[:-1].numel(), model.vocab_size)
    model.head(hidden, logits=out)
    return out.view(*hidden.shape[:-1], -1)


def assert_equal_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """In fp32."""
    torch.testing.assert_close(found, expected, atol=TOLERANCE * expected.abs().max().item(), rtol=0)


def run(model: Any, tokens: torch.Tensor, cuts: list[int], split: int) -> torch.Tensor:
    """States of every position, read in parts, the first of them as a prompt, with the layers split."""
    cache, parts = model.decoder.new_cache(tokens.shape[0], tokens.shape[1]), []
    for first, last in itertools.pairwise(cuts):
        step = model.decoder.prefill if first == 0 else model.decoder
        hidden = step(model.embed(tokens[:, first:last]), cache, 0, split)
        parts.append(step(hidden, cache, split, model.num_layers))
        cache.seq_lens += last - first
    return torch.cat(parts, 1)


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> list[list[int]]:
    """What transformers continues a prompt with."""
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return out[:, prompt.shape[1] :].tolist()
