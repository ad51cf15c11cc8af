"""The ops that are loops over other ops, out of whichever backend's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks


def draft_loop(
    forward: Callable[..., Tensor],
    head: Callable[..., Sequence[Tensor]],
    token: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    end: int,
    norm_weight: Tensor,
    head_weight: Tensor,
    eps: float,
    steps: int,
    extend: bool,
    token_map: Tensor | None = None,
    scale: Tensor | None = None,
    slots: Tensor | None = None,
    min_probability: float = 0.0,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`draft` out of a backend's own partial_forward and exit_head."""
    on_cpu = token.device.type == "cpu"
    if on_cpu and bool((token < 0).any()):  # on a GPU this would be a host sync
        raise ValueError(f"token {int(token.min())} is outside the vocabulary of {embedding.shape[0]}")
    batch, rows = token.shape[0], steps + extend
    tokens = token.new_full((batch, steps), -1)
    states = embedding.new_zeros(batch, rows, embedding.shape[1])
    probability = torch.zeros(batch, steps, dtype=torch.float32, device=token.device)
    alive = torch.ones_like(token, dtype=torch.bool)
    for row in range(rows):
        at = seq_lens + row
        # What a head without a token leaves is void, but must not index.
        hidden = embedding[token.clamp_min(0)][:, None]
        hidden = forward(hidden, weights, k_cache, v_cache, cos, sin, at, 0, end, eps, slots)[:, 0]
        states[:, row] = torch.where(alive[:, None], hidden, 0) if min_probability else hidden
        if row == steps:
            break
        sampling = (None, None, None) if temperature is None else (temperature, seed, at)
        out = None if logits is None else logits[:, row]
        token, logit, lse = head(hidden, norm_weight, head_weight, eps, token_map, scale, *sampling, out)
        chance = (logit - lse).exp()
        if min_probability:
            probability[:, row] = torch.where(alive, chance, 0)
            alive = alive & (chance >= min_probability)  # false of NaN, too
            token = torch.where(alive, token, -1)
        else:
            probability[:, row] = chance
        tokens[:, row] = token
        if on_cpu and not alive.any():
            break
    return tokens, states, probability


def round_loop(
    ops: dict[str, Callable[..., Any]],
    token: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    exit_layer: int,
    norm_weight: Tensor,
    head_weight: Tensor,
    eps: float,
    steps: int,
    draft_weight: Tensor | None = None,
    draft_map: Tensor | None = None,
    draft_scale: Tensor | None = None,
    slots: Tensor | None = None,
    min_probability: float = 0.0,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`speculative_round` out of a backend's own ``ops``, by name."""
    depth, batch = k_cache.shape[0], token.shape[0]
    shallow = _checks.layer_slots(weights, 0, depth) * exit_layer
    small = head_weight if draft_weight is None else draft_weight
    cache = (k_cache, v_cache, cos, sin, seq_lens)
    draft_logits = target_logits = None
    if temperature is not None:
        draft_logits = torch.empty(batch, steps, small.shape[0], dtype=torch.float32, device=token.device)
    tokens, states, probability = ops["draft"](
        token, embedding, weights[:shallow], *cache, exit_layer, norm_weight, small, eps, steps, True, draft_map,
        draft_scale, slots, min_probability, temperature, seed, draft_logits,
    )  # fmt: skip
    # Rows that no sequence drafted need no verification; on a GPU, to know them would be a host sync.
    drafted = steps
    if token.device.type == "cpu" and batch:
        drafted = int((tokens >= 0).long().cumprod(1).sum(1).max()) if steps else 0
    hidden = ops["partial_forward"](states[:, : drafted + 1], weights[shallow:], *cache, exit_layer, depth, eps, slots)
    hidden = hidden.flatten(0, 1)
    proposed = tokens[:, :drafted]
    if temperature is None:
        target = ops["exit_head"](hidden, norm_weight, head_weight, eps)[0].view(batch, drafted + 1)
        return tokens, *ops["accept_greedy"](proposed, target, seq_lens), probability
    assert draft_logits is not None
    target_logits = torch.empty(hidden.shape[0], head_weight.shape[0], dtype=torch.float32, device=token.device)
    ops["exit_head"](hidden, norm_weight, head_weight, eps, None, None, None, None, None, target_logits)
    accepted = ops["accept_sampled"](
        proposed, draft_logits[:, :drafted], target_logits.view(batch, drafted + 1, -1), seq_lens, temperature, seed,
        draft_map,
    )  # fmt: skip
    return tokens, *accepted, probability
