"""The small random models of `helpers`, with early exits as good as a test wants them."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, random_tokens

import layerskip_kernels

__all__ = [
    "ARCHITECTURES",
    "LAYERS",
    "ROUND",
    "UPPER",
    "VOCABULARY",
    "generous",
    "native_missing",
    "prompt_of",
    "requires_native",
    "tiny_model",
]

LAYERS = 4
# The share of what the layers after the first add to the state: all, so that few drafts are accepted; little, so that
# some are; nothing, so that all are.
UPPER = {"random": 1.0, "weak": 0.15, "silent": 0.0}


def native_missing() -> str | None:
    """Why the native CPU library is not there, or None."""
    try:
        layerskip_kernels.cpu_isa()
    except RuntimeError as error:
        return str(error)
    return None


requires_native = pytest.mark.skipif(
    native_missing() is not None, reason=f"the reference is not bitwise batch invariant; {native_missing()}"
)


def tiny_model(
    architecture: str = "llama2", dtype: torch.dtype = torch.float32, upper: str = "random", seed: int = 0
) -> Any:
    """A model of 4 layers, of which those after the first add ``UPPER[upper]`` of what they would."""
    # A tied head repeats the token that it is given, and a text of one token tests little.
    model = helpers.tiny_model(architecture, dtype, seed, tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data -= 1  # they are drawn around 1, like the weights of norms, and drown the states
    for layer in model.model.layers[1:]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= UPPER[upper]
    return model


def prompt_of(length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [1, length]."""
    return random_tokens(1, length, seed)


def generous(*args: Any, **named: Any) -> layerskip_kernels.Round:
    """``speculative_round``, wrong on purpose: it accepts one draft too many."""
    done = layerskip_kernels.speculative_round(*args, **named)
    more = (done.accepted + 1).clamp(max=done.tokens.shape[1])
    seq_lens = args[3].seq_lens
    seq_lens += more - done.accepted
    return done._replace(accepted=more)


ROUND = "layerskip.models.model.speculative_round"
"""What to put a wrong round, or one that is watched, in the place of."""
