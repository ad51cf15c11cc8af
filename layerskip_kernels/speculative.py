"""Self-speculative decoding: draft, verify, accept, roll back (LayerSkip, arXiv 2404.16710, section 4.3).

`run_draft` and `run_round` are the algorithm. Everything else that decodes speculatively is a variant of them: over a
backend's ops (`compose_draft`, `compose_round`), as one native call with the same bits, or with other ways to choose
tokens (`layerskip.decoding.spec_step`). Letters as in `functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _checks
from .dispatch import call
from .formats import lookup
from .schemas import Acceptance, Draft, Head, KVCache, Noise, Round, bind, derive, flatten

Token = TypeVar("Token")
Drafted = TypeVar("Drafted")
Accepted = TypeVar("Accepted")
Ops = Mapping[str, Callable[..., Any]]  # a backend's ops by name
Record = Callable[[Tensor, Sequence[Tensor] | None, Tensor, Draft, int, float], Tensor | None]


def run_draft(
    token: Token,
    num_speculations: int,
    extend: bool,
    forward: Callable[[Token, int], Tensor],
    choose: Callable[[Tensor, int], Token | None],
) -> int:
    """Draft tokens one at a time with the early layers; return how many.

    Parameters
    ----------
    token
        The last accepted tokens, in whatever form ``forward`` takes them.
    num_speculations : int
        K.
    extend : bool
        Whether the last draft token goes forward, too: verification needs its state, keys and values.
    forward : callable
        ``forward(token, row)`` runs layers [0, E) on the tokens at position ``seq_lens + row``: their states [B, D].
    choose : callable
        ``choose(state, row)`` gives the next tokens by the exit head, or None if no sequence drafts further.
    """
    for row in range(num_speculations):
        following = choose(forward(token, row), row)
        if following is None:
            return row
        token = following
    if extend:
        forward(token, num_speculations)
    return num_speculations


def run_round(
    draft: Callable[[], tuple[Drafted, Tensor]],
    verify: Callable[[Tensor], Tensor],
    accept: Callable[[Drafted, Tensor], Accepted],
) -> Accepted:
    """One round: the early layers draft K tokens, the remaining layers verify them in one pass.

    Parameters
    ----------
    draft : callable
        Gives draft tokens and the states [B, K + 1, D], after layer E, of the last accepted token and of every draft
        token. `run_draft` makes them; drafts from another source go through layers [0, E) in one pass.
    verify : callable
        Runs layers [E, L) on all K + 1 states at once. The keys and values of the draft are in the one KV cache, so
        nothing is computed twice.
    accept : callable
        Compares the draft tokens with what the full model chooses after each row: `accept_greedy`, `accept_sampled`.
        The leading matches are accepted, and the full model's own token follows them. ``seq_lens`` advances by as many
        positions. That is the rollback: nothing beyond this length is read before it is written again.
    """
    drafted, states = draft()
    return accept(drafted, verify(states))


def draft(
    token: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    cache: KVCache,
    exit_layer: int,
    head: Head,
    num_speculations: int,
    *,
    extend: bool,
    eps: float,
    draft_threshold: float = 0.0,
    noise: Noise | None = None,
    logits: Tensor | None = None,
    num_draft_layers: int = 0,
    ops: Ops | None = None,
) -> Draft:
    """Decode ``num_speculations`` tokens with layers [0, E) and an exit head, as one call.

    It is the loop of embedding, `partial_forward` and `exit_head`. Draft layers are n further layers between the state
    after layer E and the exit head, which only the draft uses; their keys and values are the last n layers of the
    cache. A sequence stops drafting where a token's
    probability falls below ``draft_threshold``: that token and the later ones are -1, ``probability`` keeps the value
    that stopped it, then 0. The states up to the row that would have given the missing token are there, for
    verification; the rows after them are 0, and what is in the cache there has no meaning.

    Parameters
    ----------
    token : Tensor [B], int64
        The tokens at positions ``seq_lens[b]``, each of them in 0 … V - 1.
    embedding : Tensor [V, D], or packed
    weights : sequence of Tensor
        Of the layers [0, E), then of the draft layers, as `partial_forward` takes them.
    cache : KVCache
        Its lengths are those before the first draft; they are not advanced.
    exit_layer : int
        E; all layers, to decode autoregressively.
    head : Head
    num_speculations : int
        K.
    extend : bool
        Whether the last token, too, goes through the layers: verification needs its key, value and state. So do the
        draft layers of the next draft.
    eps : float
        Of every norm.
    draft_threshold : float
        In [0, 1].
    noise : Noise, optional
        Samples, as `exit_head` does; token i has the offset ``seq_lens[b] + i``.
    logits : Tensor [B, K, V_draft], fp32, optional
        Output buffer for the raw logits, before the temperature, as `accept_sampled` takes them. Rows that were not
        drafted have no meaning.
    num_draft_layers : int
        n.
    ops : mapping, optional
        By name functions that take what the ops "partial_forward" and "exit_head" do, called in the place of the one
        fused call: for layers of another kind, of each of which ``weights`` has as many tensors.

    Returns
    -------
    Draft
        Its states are those before the draft layers. A token of -1 with a NaN for probability marks a head whose logits
        were not finite; what follows it has no meaning.
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
    """Accept the leading draft tokens that the full model agrees with, and advance the lengths.

    Parameters
    ----------
    draft : Tensor [B, K], int64
        A negative entry was not drafted; it and what follows it are not accepted.
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
    draft: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor,
    seq_lens: Tensor,
    temperature: Tensor,
    seed: Tensor,
    token_map: Tensor | None = None,
) -> Acceptance:
    """Accept or reject sampled drafts so that what comes out has exactly the full model's distribution.

    Speculative sampling (Leviathan et al. 2023): with p = softmax(target / T) and q = softmax(draft / T), which is 0
    outside the draft's own tokens, a draft x is accepted with probability min(1, p(x) / q(x)); after the first that is
    not, the next token is drawn from max(p - q, 0), normalised; after the last draft from p. The noise is named as in
    `exit_head`, row i of sequence b by the position ``seq_lens[b] + i``.

    Parameters
    ----------
    draft : Tensor [B, K], int64
        Drawn from q. A negative entry was not drafted; the token there is drawn from p.
    draft_logits : Tensor [B, K, V_draft], fp32
        As `draft` writes them. -inf masks a token.
    target_logits : Tensor [B, K + 1, V], fp32
        The full model's after each of the K + 1 rows.
    seq_lens : Tensor [B], int64
        Advanced in place by accepted + 1.
    temperature : Tensor [B], fp32
        Where it is 0, drafts are compared with the target's arg-max, as `accept_greedy` does.
    seed : Tensor [B], int64
    token_map : Tensor [V_draft], int64, optional
        The token, all different, of each of the draft's logits.

    Returns
    -------
    Acceptance
        A next token of -1 marks a row whose logits are all -inf, or hold NaN or +inf.
    """
    args = (draft, draft_logits, target_logits, seq_lens, temperature, seed, token_map)
    return Acceptance(*call("accept_sampled", *args))


def speculative_round(
    token: Tensor,
    embedding: Tensor,
    weights: Sequence[Tensor],
    cache: KVCache,
    exit_layer: int,
    head: Head,
    num_speculations: int,
    *,
    eps: float,
    draft_head: Head | None = None,
    draft_threshold: float = 0.0,
    noise: Noise | None = None,
    num_draft_layers: int = 0,
    ops: Ops | None = None,
) -> Round:
    """One round of self-speculative decoding (LayerSkip, arXiv 2404.16710, §4.3) as one call.

    It is the composition, bit for bit, of `draft` with layers [0, E) and the draft layers, `partial_forward` of the
    drafted rows through layers [E, L), `exit_head` on them, and `accept_greedy` or, with noise, `accept_sampled`.

    Parameters
    ----------
    token : Tensor [B], int64
        The last tokens, at positions ``seq_lens[b]``.
    embedding : Tensor [V, D], or packed
    weights : sequence of Tensor
        Of all L layers, then of the draft layers, as `partial_forward` takes them.
    cache : KVCache
        Of L + n layers, with room for K + 1 rows more. The lengths are advanced in place by accepted + 1.
    exit_layer : int
        E, in 1 … L.
    head : Head
        What decides: the whole vocabulary, in the dtype of the model.
    num_speculations : int
        K.
    eps : float
        Of every norm.
    draft_head : Head, optional
        What drafts; by default ``head``.
    draft_threshold : float
        As `draft` takes it, and without noise: to drop what was drawn because it is improbable would change the
        distribution of what is emitted.
    num_draft_layers : int
        n. Draft layers change the drafts, and so how many are accepted, but not what is emitted.
    noise, ops
        As `draft` takes them; ``ops`` has "accept_greedy" and "accept_sampled", too.

    Returns
    -------
    Round
    """
    if head.token_map is not None or head.scale is not None:
        raise ValueError("head has a token_map or a scale: what verifies must be the full head; give it as draft_head")
    drafting = (None, None, None, None) if draft_head is None else draft_head
    draft_norm_weight, draft_head_weight, draft_token_map, draft_head_scale = drafting
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
    split, num_layers = len(a.weights) // (a.exit_layer + a.num_draft_layers) * a.exit_layer, a.k_cache.shape[0]

    def layers(state: Tensor, row: int, weights: Sequence[Tensor], start: int, end: int) -> Tensor:
        if start == end:
            return state
        given = {"hidden": state[:, None], "weights": weights, "seq_lens": positions[row], "start": start, "end": end}
        return ops["partial_forward"](*derive("partial_forward", a, **given))[:, 0]

    def draft_layers(state: Tensor, row: int) -> Tensor:
        return layers(state, row, a.weights[split:], num_layers - a.num_draft_layers, num_layers)

    def forward(embedded: Tensor, row: int) -> Tensor:
        state = layers(embedded, row, a.weights[:split], 0, a.exit_layer)
        if row == num_speculations:
            record(state, None, a.embedding, out, row, a.draft_threshold)
            draft_layers(state, row)  # for their keys and values
        return state

    def choose(state: Tensor, row: int) -> Tensor | None:
        offset = None if a.temperature is None else positions[row]
        logits = None if a.logits is None else a.logits[:, row]
        hidden = draft_layers(state, row)
        head_output = ops["exit_head"](*derive("exit_head", a, hidden=hidden, offset=offset, logits=logits))
        following = record(state, head_output, a.embedding, out, row, a.draft_threshold)
        ended = _ended(out, row + 1, a.draft_threshold)
        if not on_cpu or ended is None or not bool(ended.all()):
            return following
        for rest in range(row + 1, rows):  # all drafts have ended, so this clears the remaining rows
            record(state, head_output if rest < num_speculations else None, a.embedding, out, rest, a.draft_threshold)
        return None

    first = lookup(a.embedding, a.token.clamp_min(0), hidden_size, dtype)
    run_draft(first, num_speculations, a.extend, forward, choose)
    return out


def compose_round(ops: Ops, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`speculative_round` out of a backend's draft, partial_forward, exit_head, accept_greedy and accept_sampled."""
    a = bind("speculative_round", *args)
    num_layers, batch, device = a.k_cache.shape[0] - a.num_draft_layers, a.token.shape[0], a.token.device
    per_layer, samples = len(a.weights) // a.k_cache.shape[0], a.temperature is not None
    deep_begin, deep_end = per_layer * a.exit_layer, per_layer * num_layers
    draft_head_weight = a.head_weight if a.draft_head_weight is None else a.draft_head_weight
    draft_logits = None
    if samples:
        size = (batch, a.num_speculations, draft_head_weight.shape[0])
        draft_logits = torch.empty(size, dtype=torch.float32, device=device)

    def draft() -> tuple[Draft, Tensor]:
        drafted = Draft(*ops["draft"](*derive(
            "draft", a, weights=[*a.weights[:deep_begin], *a.weights[deep_end:]], head_weight=draft_head_weight,
            norm_weight=a.norm_weight if a.draft_norm_weight is None else a.draft_norm_weight,
            extend=True, token_map=a.draft_token_map, scale=a.draft_head_scale, logits=draft_logits,
        )))  # fmt: skip
        return drafted, drafted.states[:, : _most_drafts(drafted.tokens) + 1]

    def verify(states: Tensor) -> Tensor:
        deep = {"weights": a.weights[deep_begin:deep_end], "start": a.exit_layer, "end": num_layers}
        return ops["partial_forward"](*derive("partial_forward", a, hidden=states, **deep))

    def accept(drafted: Draft, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, count, target_logits = drafted.tokens, hidden.shape[1] - 1, None
        if samples:
            size = (batch * (count + 1), a.head_weight.shape[0])
            target_logits = torch.empty(size, dtype=torch.float32, device=device)
        full = {"hidden": hidden.flatten(0, 1), "temperature": None, "seed": None, "logits": target_logits}
        target = ops["exit_head"](*derive("exit_head", a, **full))[0].view(batch, count + 1)
        if draft_logits is None or target_logits is None:
            accepted, next_token = ops["accept_greedy"](tokens[:, :count], target, a.seq_lens)
        else:
            accepted, next_token = ops["accept_sampled"](*derive(
                "accept_sampled", a, draft=tokens[:, :count], draft_logits=draft_logits[:, :count],
                target_logits=target_logits.view(batch, count + 1, -1), token_map=a.draft_token_map,
            ))  # fmt: skip
        return tokens, accepted, next_token, drafted.probability

    return run_round(draft, verify, accept)


def _most_drafts(tokens: Tensor) -> int:
    """How many drafts need verification: the most of any sequence. On a GPU all: a look would be a host sync."""
    if tokens.device.type != "cpu" or not tokens.numel():
        return tokens.shape[1]
    return int((tokens >= 0).long().cumprod(1).sum(1).max())
