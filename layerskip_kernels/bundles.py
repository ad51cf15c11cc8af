"""Named tuples for arguments that several ops share, and for what ops return.

The fields of `KVCache`, `Head` and `Noise` have the names of the schemas' arguments (`schemas.py`), so that a bundle
can be flattened by name. Letters as in `functional`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class LayerWeights(NamedTuple):
    """The tensors of one layer, in the order in which the ops take them; the last five are optional.

    ``attn_norm``, ``mlp_norm`` [D], ``q`` [H C, D], ``k``, ``v`` [G C, D], ``o`` [D, H C], ``gate``, ``up`` [F, D],
    ``down`` [D, F], ``q_bias`` [H C], ``k_bias``, ``v_bias`` [G C], ``q_norm``, ``k_norm`` [C].
    """

    attn_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


OPTIONAL_WEIGHTS = tuple(LayerWeights._field_defaults)
REQUIRED_WEIGHTS = tuple(name for name in LayerWeights._fields if name not in OPTIONAL_WEIGHTS)


def layer_shapes(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a layer, by its name and in the order of `LayerWeights`."""
    queries, keys = num_heads * head_dim, num_kv_heads * head_dim
    return {
        "attn_norm": (hidden_size,),
        "q": (queries, hidden_size),
        "k": (keys, hidden_size),
        "v": (keys, hidden_size),
        "o": (hidden_size, queries),
        "mlp_norm": (hidden_size,),
        "gate": (intermediate_size, hidden_size),
        "up": (intermediate_size, hidden_size),
        "down": (hidden_size, intermediate_size),
        "q_bias": (queries,),
        "k_bias": (keys,),
        "v_bias": (keys,),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }


def weights_per_layer(weights: Sequence[Tensor], start: int, end: int, num_draft_layers: int = 0) -> int:
    """How many tensors of the flat list ``weights`` describe each of the layers [start, end) and draft layers.

    Raises
    ------
    ValueError
        If there are neither the required tensors for each layer nor all of them.
    """
    layers = end - start + num_draft_layers
    required, all_weights = len(REQUIRED_WEIGHTS), len(LayerWeights._fields)
    if layers == 0 and not weights:
        return required
    for count in (required, all_weights):
        if len(weights) == layers * count:
            return count
    draft_layers = f" and {num_draft_layers} draft layers" if num_draft_layers else ""
    raise ValueError(
        f"layers [{start}, {end}){draft_layers} take {required} or {all_weights} weights each, got {len(weights)} for "
        f"{layers} layers"
    )


def split_layers(weights: Sequence[Tensor], start: int, end: int) -> Iterator[LayerWeights]:
    """Each layer of [start, end) out of a flat list, in which an optional tensor without elements is absent."""
    count, required = weights_per_layer(weights, start, end), len(REQUIRED_WEIGHTS)
    for first in range(0, len(weights), count):
        optional = weights[first + required : first + count]
        yield LayerWeights(
            *weights[first : first + required], *(weight if weight.numel() else None for weight in optional)
        )


class KVCache(NamedTuple):
    """Keys and values, in place, and where the next rows go.

    ``k_cache``, ``v_cache`` [L, B, G, T, C]; ``cos``, ``sin`` [≥ T, C/2] fp32, of the rotary embedding; ``seq_lens``
    [B] int64. With ``slots`` [B] int64, all different, sequence b has row ``slots[b]`` of the cache, which then has any
    number of rows in the place of B.
    """

    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor
    sin: Tensor
    seq_lens: Tensor
    slots: Tensor | None = None


class Head(NamedTuple):
    """A final norm and a head: ``norm_weight`` [D], ``head_weight`` [V, D].

    A draft's head may be reduced to some tokens, with the ``token_map`` [V] int64 of its rows, and int8 with a
    ``scale`` [V] fp32 a row.
    """

    norm_weight: Tensor
    head_weight: Tensor
    token_map: Tensor | None = None
    scale: Tensor | None = None


class Noise(NamedTuple):
    """How to sample: ``temperature`` [B] fp32, where 0 is greedy, and the ``seed`` [B] int64 that names the noise."""

    temperature: Tensor
    seed: Tensor


class ExitOutput(NamedTuple):
    """What an exit head gives: ``token`` [R] int64, its ``logit`` [R] fp32, ``logsumexp`` [R] fp32.

    ``exp(logit - logsumexp)`` is the token's probability. A token of -1 marks a row whose logits are not finite.
    """

    token: Tensor
    logit: Tensor
    logsumexp: Tensor


class Draft(NamedTuple):
    """What drafting gives.

    ``tokens`` [B, K] int64, ``states`` [B, K or K + 1, D] after the exit layer, and ``probability`` [B, K] fp32, what
    the exit gave each token.
    """

    tokens: Tensor
    states: Tensor
    probability: Tensor


class Acceptance(NamedTuple):
    """What verification gives: ``accepted`` [B] int64 leading draft tokens, ``next_token`` [B] int64."""

    accepted: Tensor
    next_token: Tensor


class Round(NamedTuple):
    """What a round of self-speculative decoding gives.

    ``tokens`` [B, K] int64 were drafted, ``accepted`` [B] int64 of them hold, ``next_token`` [B] int64 follows those;
    ``probability`` [B, K] fp32 is what the exit gave each draft.
    """

    tokens: Tensor
    accepted: Tensor
    next_token: Tensor
    probability: Tensor


class EarlyExitLossOutput(NamedTuple):
    """What training minimises: ``loss``, a scalar, and ``exit_losses`` [N], each exit's own mean, detached."""

    loss: Tensor
    exit_losses: Tensor
