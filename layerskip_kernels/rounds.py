"""Self-speculative decoding: the documented ops draft, accept, and a round of both. Letters as in `functional`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from . import _checks
from .bundles import Acceptance, Draft, Head, KVCache, Noise, Round
from .composition import Ops, compose_draft, compose_round
from .dispatch import call
from .schemas import flatten


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
