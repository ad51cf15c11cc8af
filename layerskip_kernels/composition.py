"""Drafts and rounds in Python, out of the other ops of whichever backend.

The native kernels compute the same bits in one call. Letters as in `functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _checks
from .bundles import Draft
from .formats import lookup
from .schemas import bind, derive

Token = TypeVar("Token")
Ops = Mapping[str, Callable[..., Any]]  # a backend's ops by name
Record = Callable[[Tensor, Sequence[Tensor] | None, Tensor, Draft, int, float], Tensor | None]


def draft_loop(
    token: Token,
    num_speculations: int,
    extend: bool,
    forward: Callable[[Token, int], Tensor],
    choose: Callable[[Tensor, int], Token | None],
) -> int:
    """Draft: a token gives a state, a state gives the next token.

    Parameters
    ----------
    token
        The last tokens, in whatever form ``forward`` takes them.
    num_speculations : int
        K.
    extend : bool
        Whether the last token, too, goes forward.
    forward : callable
        ``forward(token, row)`` runs the layers up to the exit on the tokens of a row: their states [B, D].
    choose : callable
        ``choose(state, row)`` gives the tokens after it, or None where no sequence drafts any further.

    Returns
    -------
    int
        How many tokens were drafted: K, or fewer where ``choose`` ended it.
    """
    for row in range(num_speculations):
        following = choose(forward(token, row), row)
        if following is None:
            return row
        token = following
    if extend:
        forward(token, num_speculations)
    return num_speculations


def record_draft(
    state: Tensor,
    head_output: Sequence[Tensor] | None,
    embedding: Tensor,
    out: Draft,
    row: int,
    draft_threshold: float,
) -> Tensor | None:
    """Write a row of a draft, and embed its tokens, [B, D].

    With a threshold a draft ends where its probability is below: that token and those after it are -1, and what comes
    after it has state 0 and probability 0. Without one, -1 marks logits that are not finite and ends nothing.

    Parameters
    ----------
    state : Tensor [B, D]
    head_output : (token, logit, logsumexp), each [B], or None
        What the exit head gives for ``state``; None for row K, which has a state alone.
    embedding : Tensor [V, D], or packed
    out : Draft
        Its row ``row`` is written.
    row : int
    draft_threshold : float
    """
    ended = _ended(out, row, draft_threshold)
    out.states[:, row] = state if ended is None else torch.where(ended[:, None], 0, state)
    if head_output is None:
        return None
    token, logit, logsumexp = head_output
    chance = (logit - logsumexp).exp()
    chance = chance if ended is None else torch.where(ended, 0, chance)
    if draft_threshold > 0:
        token = torch.where(chance >= draft_threshold, token, -1)  # false of NaN, too
    out.tokens[:, row], out.probability[:, row] = token, chance
    valid = token.clamp_min(0)  # what follows a -1 has no meaning, but an index must be valid
    return lookup(embedding, valid, state.shape[1], state.dtype)


def _ended(out: Draft, row: int, draft_threshold: float) -> Tensor | None:
    """Which drafts have ended before ``row``, [B]; None where none can have."""
    return out.tokens[:, row - 1] < 0 if row > 0 and draft_threshold > 0 else None


def compose_draft(ops: Ops, *args: Any, record: Record = record_draft) -> tuple[Tensor, Tensor, Tensor]:
    """`draft` out of a backend's partial_forward and exit_head; ``record`` is `record_draft`, or does the same."""
    a = bind("draft", *args)
    on_cpu, batch, num_speculations = a.token.device.type == "cpu", a.token.shape[0], a.num_speculations
    if on_cpu:  # on a GPU a look at the tokens would be a host sync
        _checks.tokens(a.token, a.embedding.shape[0])
    rows, tokens = num_speculations + a.extend, a.token.new_empty(batch, num_speculations)
    hidden_size, dtype = a.norm_weight.shape[0], a.norm_weight.dtype
    states = a.norm_weight.new_empty(batch, rows, hidden_size)
    out = Draft(tokens, states, torch.empty_like(tokens, dtype=torch.float32))
    positions = [a.seq_lens + row for row in range(rows)]
    shallow, draft_layers = _shallow_and_draft_layers(ops, a)

    def forward(embedded: Tensor, row: int) -> Tensor:
        state = shallow(embedded, positions[row])
        if row == num_speculations:
            record(state, None, a.embedding, out, row, a.draft_threshold)
            draft_layers(state, positions[row])  # for their keys and values
        return state

    def choose(state: Tensor, row: int) -> Tensor | None:
        offset = None if a.temperature is None else positions[row]
        logits = None if a.logits is None else a.logits[:, row]
        hidden = draft_layers(state, positions[row])
        head_output = ops["exit_head"](*derive("exit_head", a, hidden=hidden, offset=offset, logits=logits))
        following = record(state, head_output, a.embedding, out, row, a.draft_threshold)
        ended = _ended(out, row + 1, a.draft_threshold)
        if not on_cpu or ended is None or not bool(ended.all()):
            return following
        for rest in range(row + 1, rows):  # all drafts have ended, so that this clears the rows that are left
            record(state, head_output if rest < num_speculations else None, a.embedding, out, rest, a.draft_threshold)
        return None

    first = lookup(a.embedding, a.token.clamp_min(0), hidden_size, dtype)
    draft_loop(first, num_speculations, a.extend, forward, choose)
    return out


def _shallow_and_draft_layers(ops: Ops, a: Any) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """Layers [0, E) of a draft's arguments, and its draft layers: (states [B, D], positions [B]) -> states."""

    def layers(weights: Sequence[Tensor], start: int, end: int) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(state: Tensor, seq_lens: Tensor) -> Tensor:
            if start == end:
                return state
            given = {"hidden": state[:, None], "weights": weights, "seq_lens": seq_lens, "start": start, "end": end}
            return ops["partial_forward"](*derive("partial_forward", a, **given))[:, 0]

        return forward

    split = len(a.weights) // (a.exit_layer + a.num_draft_layers) * a.exit_layer
    num_layers = a.k_cache.shape[0]
    return layers(a.weights[:split], 0, a.exit_layer), layers(
        a.weights[split:], num_layers - a.num_draft_layers, num_layers
    )


def compose_round(ops: Ops, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`speculative_round` out of a backend's draft, partial_forward, exit_head, accept_greedy and accept_sampled."""
    a = bind("speculative_round", *args)
    num_layers, batch, device = a.k_cache.shape[0] - a.num_draft_layers, a.token.shape[0], a.token.device
    each, samples = len(a.weights) // a.k_cache.shape[0], a.temperature is not None
    exit_at, draft_layers_at = each * a.exit_layer, each * num_layers
    draft_norm_weight = a.norm_weight if a.draft_norm_weight is None else a.draft_norm_weight
    draft_head_weight = a.head_weight if a.draft_head_weight is None else a.draft_head_weight
    draft_logits = target_logits = None
    if samples:
        size = (batch, a.num_speculations, draft_head_weight.shape[0])
        draft_logits = torch.empty(size, dtype=torch.float32, device=device)
    tokens, states, probability = ops["draft"](*derive(
        "draft", a, weights=[*a.weights[:exit_at], *a.weights[draft_layers_at:]], norm_weight=draft_norm_weight,
        head_weight=draft_head_weight, extend=True, token_map=a.draft_token_map, scale=a.draft_head_scale,
        logits=draft_logits,
    ))  # fmt: skip
    drafted = _most_drafts(tokens)
    deep = {"weights": a.weights[exit_at:draft_layers_at], "start": a.exit_layer, "end": num_layers}
    layers = derive("partial_forward", a, hidden=states[:, : drafted + 1], **deep)
    hidden = ops["partial_forward"](*layers).flatten(0, 1)
    if samples:
        target_logits = torch.empty(hidden.shape[0], a.head_weight.shape[0], dtype=torch.float32, device=device)
    full = {"hidden": hidden, "temperature": None, "seed": None, "logits": target_logits}
    target = ops["exit_head"](*derive("exit_head", a, **full))[0].view(batch, drafted + 1)
    if draft_logits is None or target_logits is None:
        return tokens, *ops["accept_greedy"](tokens[:, :drafted], target, a.seq_lens), probability
    accepted = ops["accept_sampled"](*derive(
        "accept_sampled", a, draft=tokens[:, :drafted], draft_logits=draft_logits[:, :drafted],
        target_logits=target_logits.view(batch, drafted + 1, -1), token_map=a.draft_token_map,
    ))  # fmt: skip
    return tokens, *accepted, probability


def _most_drafts(tokens: Tensor) -> int:
    """How many drafts need verification: the most of any sequence. On a GPU all: a look would be a host sync."""
    if tokens.device.type != "cpu" or not tokens.numel():
        return tokens.shape[1]
    return int((tokens >= 0).long().cumprod(1).sum(1).max())
