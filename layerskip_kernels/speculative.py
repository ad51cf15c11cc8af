"""Self-speculative decoding: draft, verify, accept, roll back (LayerSkip, arXiv 2404.16710, section 4.3).

`draft` and `speculative_round` are one fused call. `compose_draft` and `compose_round` compute the same, with the same
bits, by the ops of one backend. Letters as in `functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from . import _checks
from .dispatch import call
from .formats import lookup
from .schemas import Acceptance, Draft, Head, KVCache, Noise, Round, bind, derive, flatten

Ops = Mapping[str, Callable[..., Any]]  # a backend's ops by name
Record = Callable[[Tensor, Sequence[Tensor] | None, Tensor, Draft, int, float], Tensor | None]


def record_draft(
    state: Tensor, head_output: Sequence[Tensor] | None, embedding: Tensor, out: Draft, row: int, draft_threshold: float
) -> Tensor | None:
    """Write one row of a draft; return the embedding of its tokens, [B, D].

    A sequence stops drafting at the first token whose probability is below the threshold: that token and the later ones
    are -1, later states and probabilities are 0. At threshold 0, -1 marks logits that are not finite and stops nothing.

    Parameters
    ----------
    state : Tensor [B, D]
    head_output : (token, logit, logsumexp), each [B], or None
        The exit head's output for ``state``; None for row K, which has no token.
    embedding : Tensor [V, D], or packed
    out : Draft
        Written in place.
    row : int
    draft_threshold : float
    """
    stopped = _stopped(out, row, draft_threshold)
    out.states[:, row] = state if stopped is None else torch.where(stopped[:, None], 0, state)
    if head_output is None:
        return None
    token, logit, logsumexp = head_output
    probability = (logit - logsumexp).exp()
    probability = probability if stopped is None else torch.where(stopped, 0, probability)
    if draft_threshold > 0:
        token = torch.where(probability >= draft_threshold, token, -1)  # -1 for NaN, too
    out.tokens[:, row], out.probability[:, row] = token, probability
    token = token.clamp_min(0)  # after a -1 any valid index will do
    _checks.tokens(token, embedding.shape[0])
    return lookup(embedding, token, state.shape[1], state.dtype)


def _stopped(out: Draft, row: int, draft_threshold: float) -> Tensor | None:
    """Which sequences stopped drafting before ``row``, [B]; None if none can have."""
    return out.tokens[:, row - 1] < 0 if row > 0 and draft_threshold > 0 else None


def compose_draft(ops: Ops, *args: Any, record: Record = record_draft) -> tuple[Tensor, Tensor, Tensor]:
    """`draft` out of a backend's partial_forward and exit_head; ``record`` may be a faster `record_draft`."""
    a = bind("draft", *args)
    on_cpu, batch, num_speculations = a.token.device.type == "cpu", a.token.shape[0], a.num_speculations
    _checks.tokens(a.token, a.embedding.shape[0])
    rows, hidden_size, cache_layers = num_speculations + a.extend, a.norm_weight.shape[0], a.k_cache.shape[0]
    tokens = a.token.new_empty(batch, num_speculations)
    states = a.norm_weight.new_empty(batch, rows, hidden_size)
    out = Draft(tokens, states, torch.empty_like(tokens, dtype=torch.float32))
    positions = [a.seq_lens + row for row in range(rows)]
    split = len(a.weights) // (a.exit_layer + a.num_draft_layers) * a.exit_layer

    def layers(state: Tensor, row: int, weights: Sequence[Tensor], start: int, end: int) -> Tensor:
        if start == end:
            return state
        given = {"hidden": state[:, None], "weights": weights, "seq_lens": positions[row], "start": start, "end": end}
        return ops["partial_forward"](*derive("partial_forward", a, **given))[:, 0]

    embedded = lookup(a.embedding, a.token.clamp_min(0), hidden_size, a.norm_weight.dtype)
    for row in range(rows):
        state = layers(embedded, row, a.weights[:split], 0, a.exit_layer)
        hidden = layers(state, row, a.weights[split:], cache_layers - a.num_draft_layers, cache_layers)
        if row == num_speculations:  # only for the keys and values of the last draft token, and its state
            record(state, None, a.embedding, out, row, a.draft_threshold)
            break
        offset = None if a.temperature is None else positions[row]
        logits = None if a.logits is None else a.logits[:, row]
        head_output = ops["exit_head"](*derive("exit_head", a, hidden=hidden, offset=offset, logits=logits))
        embedded = cast(Tensor, record(state, head_output, a.embedding, out, row, a.draft_threshold))
        stopped = _stopped(out, row + 1, a.draft_threshold)
        if on_cpu and stopped is not None and bool(stopped.all()):
            for rest in range(row + 1, rows):  # clear the remaining rows
                rest_output = head_output if rest < num_speculations else None
                record(state, rest_output, a.embedding, out, rest, a.draft_threshold)
            break
    return out


def compose_round(ops: Ops, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`speculative_round` out of a backend's draft, partial_forward, exit_head, accept_greedy and accept_sampled."""
    a = bind("speculative_round", *args)
    num_layers, batch = a.k_cache.shape[0] - a.num_draft_layers, a.token.shape[0]
    per_layer, samples = len(a.weights) // a.k_cache.shape[0], a.temperature is not None
    late_begin, late_end = per_layer * a.exit_layer, per_layer * num_layers  # the weights of layers [E, L)
    draft_head_weight = a.head_weight if a.draft_head_weight is None else a.draft_head_weight

    def empty_logits(*shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=a.token.device) if samples else None

    draft_logits = empty_logits(batch, a.num_speculations, draft_head_weight.shape[0])

    # Draft.
    drafted = Draft(*ops["draft"](*derive(
        "draft", a, weights=[*a.weights[:late_begin], *a.weights[late_end:]], head_weight=draft_head_weight,
        norm_weight=a.norm_weight if a.draft_norm_weight is None else a.draft_norm_weight,
        extend=True, token_map=a.draft_token_map, scale=a.draft_head_scale, logits=draft_logits,
    )))  # fmt: skip
    rows = _longest_draft(drafted.tokens) + 1
    # Verify.
    late = {"weights": a.weights[late_begin:late_end], "start": a.exit_layer, "end": num_layers}
    hidden = ops["partial_forward"](*derive("partial_forward", a, hidden=drafted.states[:, :rows], **late))
    target_logits = empty_logits(batch * rows, a.head_weight.shape[0])
    full = {"hidden": hidden.flatten(0, 1), "temperature": None, "seed": None, "logits": target_logits}
    target = ops["exit_head"](*derive("exit_head", a, **full))[0].view(batch, rows)
    # Accept. `seq_lens` advances past the accepted tokens, which rolls back the others.
    tokens = drafted.tokens[:, : rows - 1]
    if draft_logits is None or target_logits is None:
        accepted, next_token = ops["accept_greedy"](tokens, target, a.seq_lens)
    else:
        accepted, next_token = ops["accept_sampled"](*derive(
            "accept_sampled", a, draft=tokens, draft_logits=draft_logits[:, : rows - 1],
            target_logits=target_logits.view(batch, rows, -1), token_map=a.draft_token_map,
        ))  # fmt: skip
    return drafted.tokens, accepted, next_token, drafted.probability


def _longest_draft(tokens: Tensor) -> int:
    """The length of the longest draft; on a GPU K, since the true one would take a host sync."""
    if tokens.device.type != "cpu" or not tokens.numel():
        return tokens.shape[1]
    return int((tokens >= 0).long().cumprod(1).sum(1).max())


def draft(
    token: Tensor, embedding: Tensor, weights: Sequence[Tensor], cache: KVCache, exit_layer: int, head: Head,
    num_speculations: int, *, extend: bool, eps: float, draft_threshold: float = 0.0, noise: Noise | None = None,
    logits: Tensor | None = None, num_draft_layers: int = 0, ops: Ops | None = None
) -> Draft:  # fmt: skip
    """Decode K tokens with layers [0, E) and an exit head as one call.

    Draft layers are n further layers between the state after layer E and the exit head, which only the draft uses; they
    own the last n layers of the cache. A sequence stops drafting at the first token whose probability is below
    ``draft_threshold``. That token and the later ones are -1; ``probability`` keeps the value that stopped it, then 0.
    Verification needs the states up to the last draft token; later states are 0, and later cache entries are void.

    Parameters
    ----------
    token : Tensor [B], int64
        The tokens at positions ``seq_lens[b]``, each in [0, V).
    embedding : Tensor [V, D], or packed
    weights : sequence of Tensor
        Of layers [0, E), then of the draft layers, as in `partial_forward`.
    cache : KVCache
        ``seq_lens`` are the lengths before the first draft token; they are not advanced.
    exit_layer : int
        E; L decodes autoregressively.
    head : Head
    num_speculations : int
        K.
    extend : bool
        Whether to run the layers on the last draft token, too: verification, and draft layers in the next round, need
        its keys and values.
    eps : float
        Of every norm.
    draft_threshold : float
        In [0, 1].
    noise : Noise, optional
        Sample as in `exit_head`; token i has offset ``seq_lens[b] + i``.
    logits : Tensor [B, K, V_draft], fp32, optional
        Output buffer for the raw logits, before the temperature. Rows after a sequence has stopped are void.
    num_draft_layers : int
        n.
    ops : mapping, optional
        "partial_forward" and "exit_head" as functions with these ops' arguments, instead of the fused call: for layers
        of another architecture, with any number of tensors per layer in ``weights``.

    Returns
    -------
    Draft
        ``states`` are those before the draft layers. A token of -1 with probability NaN marks logits that are not
        finite; what follows it is void.
    """
    args = flatten(
        "draft", cache, head, noise, token=token, embedding=embedding, weights=weights, exit_layer=exit_layer,
        num_speculations=num_speculations, extend=extend, eps=eps, draft_threshold=draft_threshold, logits=logits,
        num_draft_layers=num_draft_layers,
    )  # fmt: skip
    if ops is None:
        return Draft(*call("draft", *args))
    _checks.draft_of_any_layers(args)
    return Draft(*compose_draft(ops, *args))


def accept_greedy(draft: Tensor, target: Tensor, seq_lens: Tensor) -> Acceptance:
    """Accept the leading draft tokens that match the full model's choice, and advance the lengths.

    Parameters
    ----------
    draft : Tensor [B, K], int64
        A negative entry ends the draft.
    target : Tensor [B, K + 1], int64
        The full model's choice after each of the K + 1 rows.
    seq_lens : Tensor [B], int64
        Advanced in place by accepted + 1.

    Returns
    -------
    Acceptance
        ``next_token[b] = target[b, accepted[b]]``.
    """
    return Acceptance(*call("accept_greedy", draft, target, seq_lens))


def accept_sampled(
    draft: Tensor, draft_logits: Tensor, target_logits: Tensor, seq_lens: Tensor, temperature: Tensor, seed: Tensor,
    token_map: Tensor | None = None
) -> Acceptance:  # fmt: skip
    """Accept or reject sampled draft tokens so that the output has exactly the full model's distribution.

    Speculative sampling (Leviathan et al. 2023): with p = softmax(target / T) and q = softmax(draft / T), which is 0
    outside ``token_map``, a draft token x is accepted with probability min(1, p(x) / q(x)). The next token is drawn
    from max(p - q, 0), normalised, after a rejection, and from p after the last draft token. Noise is indexed as in
    `exit_head`; the offset of row i of sequence b is ``seq_lens[b] + i``.

    Parameters
    ----------
    draft : Tensor [B, K], int64
        Drawn from q. A negative entry ends the draft; the next token is drawn from p.
    draft_logits : Tensor [B, K, V_draft], fp32
        As `draft` writes them. -inf masks a token.
    target_logits : Tensor [B, K + 1, V], fp32
        The full model's after each of the K + 1 rows.
    seq_lens : Tensor [B], int64
        Advanced in place by accepted + 1.
    temperature : Tensor [B], fp32
        Where it is 0, draft tokens are compared with the target's arg-max, as in `accept_greedy`.
    seed : Tensor [B], int64
    token_map : Tensor [V_draft], int64, optional
        The token of each draft logit; no duplicates.

    Returns
    -------
    Acceptance
        ``next_token`` is -1 where the row's logits are all -inf, or hold NaN or +inf.
    """
    args = (draft, draft_logits, target_logits, seq_lens, temperature, seed, token_map)
    return Acceptance(*call("accept_sampled", *args))


def speculative_round(
    token: Tensor, embedding: Tensor, weights: Sequence[Tensor], cache: KVCache, exit_layer: int, head: Head,
    num_speculations: int, *, eps: float, draft_head: Head | None = None, draft_threshold: float = 0.0,
    noise: Noise | None = None, num_draft_layers: int = 0, ops: Ops | None = None
) -> Round:  # fmt: skip
    """One round of self-speculative decoding as one call: draft, verify, accept, roll back.

    Bit for bit the composition of `draft`, `partial_forward` of the draft's states through layers [E, L), `exit_head`,
    and `accept_greedy` or, with noise, `accept_sampled`.

    Parameters
    ----------
    token : Tensor [B], int64
        The last tokens, at positions ``seq_lens[b]``.
    embedding : Tensor [V, D], or packed
    weights : sequence of Tensor
        Of all L layers, then of the draft layers, as in `partial_forward`.
    cache : KVCache
        Of L + n layers, with room for K + 1 more rows. ``seq_lens`` advances in place by accepted + 1.
    exit_layer : int
        E, in [1, L].
    head : Head
        Verifies: the full vocabulary, in the model's dtype or packed.
    num_speculations : int
        K.
    eps : float
        Of every norm.
    draft_head : Head, optional
        Drafts; by default ``head``.
    draft_threshold : float
        As in `draft`. Must be 0 with noise: dropping improbable samples would change the output's distribution.
    num_draft_layers : int
        n. Draft layers change the acceptance rate, not the output.
    noise, ops
        As in `draft`; ``ops`` also has "accept_greedy" and "accept_sampled".

    Returns
    -------
    Round
    """
    if head.token_map is not None or head.scale is not None:
        raise ValueError("head has a token_map or a scale: what verifies must be the full head; give it as draft_head")
    draft_norm_weight, draft_head_weight, draft_token_map, draft_head_scale = draft_head or (None, None, None, None)
    args = flatten(
        "speculative_round", cache, noise, token=token, embedding=embedding, weights=weights, exit_layer=exit_layer,
        norm_weight=head.norm_weight, head_weight=head.head_weight, eps=eps, num_speculations=num_speculations,
        draft_norm_weight=draft_norm_weight, draft_head_weight=draft_head_weight, draft_token_map=draft_token_map,
        draft_head_scale=draft_head_scale, draft_threshold=draft_threshold, num_draft_layers=num_draft_layers,
    )  # fmt: skip
    if ops is None:
        return Round(*call("speculative_round", *args))
    _checks.round_of_any_layers(args)
    return Round(*compose_round({**ops, "draft": partial(compose_draft, ops)}, *args))
