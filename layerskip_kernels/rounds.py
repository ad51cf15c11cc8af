"""The documented ops of self-speculative decoding: draft, accept, and a round of both. Letters as in `functional`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._call import call


class Draft(NamedTuple):
    """What drafting gives.

    ``tokens`` [B, K] int64, ``states`` [B, K or K + 1, D] after the exit layer, and ``probability`` [B, K] fp32, what
    the exit gave each token.
    """

    tokens: Tensor
    states: Tensor
    probability: Tensor


class Acceptance(NamedTuple):
    """What verification says: ``accepted`` [B] int64 leading draft tokens, ``next_token`` [B] int64."""

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


def draft(
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
) -> Draft:
    """Decode ``steps`` tokens with layers [0, end) and an exit head, as one call: embed, partial_forward, exit_head.

    A sequence stops drafting where a token's probability falls below ``min_probability``: that token and the later ones
    are -1, ``probability`` keeps the value that stopped it, then 0. The states up to the row that would have given the
    missing token are there, for verification; the rows after them are 0, and what is in the cache there is void.

    Parameters
    ----------
    token : Tensor [B], int64
        The tokens at positions ``seq_lens[b]``, each of them in 0 … V - 1.
    embedding : Tensor [V, D]
    weights, k_cache, v_cache, cos, sin
        As `partial_forward` takes them for layers [0, end).
    seq_lens : Tensor [B], int64
        Lengths before the first step; they are not advanced.
    end : int
        The exit layer; all layers, to decode autoregressively.
    norm_weight, head_weight, token_map, scale
        As `exit_head` takes them.
    eps : float
        Of every norm.
    steps : int
        K.
    extend : bool
        Whether the last token, too, goes through the layers: verification needs its key, value and state.
    slots : Tensor [B], int64, optional
        The cache row of each sequence, all different; the cache then has any number of rows in the place of B.
    min_probability : float
        In [0, 1].
    temperature : Tensor [B], fp32, optional
        Samples, as `exit_head` does; token i has the offset ``seq_lens[b] + i``.
    seed : Tensor [B], int64
        With a temperature, and only with one.
    logits : Tensor [B, K, V_draft], fp32, optional
        Is given the exit's logits, as `accept_sampled` takes them. Rows that were not drafted are void.

    Returns
    -------
    Draft
        A token of -1 with a NaN for probability marks a head whose logits were not finite; what follows it is void.
    """
    return Draft(
        *call(
            "draft", token, embedding, weights, k_cache, v_cache, cos, sin, seq_lens, end, norm_weight,
            head_weight, eps, steps, extend, token_map, scale, slots, min_probability, temperature, seed, logits,
        )
    )  # fmt: skip


def accept_greedy(draft: Tensor, target: Tensor, seq_lens: Tensor) -> Acceptance:
    """Accept the leading draft tokens that the full model agrees with, and advance the lengths.

    Parameters
    ----------
    draft : Tensor [B, K], int64
        A negative entry marks a slot that was not drafted; it and what follows it are not accepted.
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
        Drawn from q. A negative entry marks a slot that was not drafted; the token there is drawn from p.
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
) -> Round:
    """One round of self-speculative decoding (LayerSkip, arXiv 2404.16710, §4.3) as one call.

    It is the composition, bit for bit, of `draft` with layers [0, E), `partial_forward` of the drafted rows through
    layers [E, L), `exit_head` on them, and `accept_greedy` or, with a temperature, `accept_sampled`.

    Parameters
    ----------
    token : Tensor [B], int64
        The last tokens, at positions ``seq_lens[b]``.
    embedding : Tensor [V, D]
    weights : sequence of Tensor
        Of all L layers, as `partial_forward` takes them.
    k_cache, v_cache : Tensor [L, B, G, T, C]
        Written in place. They must have room for ``steps + 1`` rows more.
    cos, sin : Tensor [≥ T, C/2], fp32
    seq_lens : Tensor [B], int64
        Advanced in place by accepted + 1.
    exit_layer : int
        E, in 1 … L.
    norm_weight, head_weight
        As `exit_head` takes them, in the dtype of the model: they decide.
    eps : float
        Of every norm.
    steps : int
        K.
    draft_weight, draft_map, draft_scale
        A head for the drafts, as `exit_head` takes it; by default the full one.
    slots, temperature, seed
        As `draft` takes them.
    min_probability : float
        As `draft` takes it, and without a temperature: to drop what was drawn because it is improbable would change the
        distribution of what is emitted.

    Returns
    -------
    Round
    """
    return Round(
        *call(
            "speculative_round", token, embedding, weights, k_cache, v_cache, cos, sin, seq_lens, exit_layer,
            norm_weight, head_weight, eps, steps, draft_weight, draft_map, draft_scale, slots, min_probability,
            temperature, seed,
        )
    )  # fmt: skip
