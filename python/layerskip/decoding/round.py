"""A round's work on the device: over fixed tensors, with no look at the host.

Both kinds of round give one tensor [B, 2 + K] int64, which is all that the host reads: how many drafts hold, the token
that follows them, the K drafts. -1 stands for a token of logits that are not finite, `NOT_DRAFTED` for a draft that
was not made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .rows import Rows

NOT_DRAFTED = -2


def speculate(
    model: LayerSkipModel,
    cache: SharedKVCache,
    rows: Rows,
    exit_layer: int,
    steps: int,
    draft_head: EarlyExitHead,
    min_probability: float = 0.0,
) -> Tensor:
    """Draft with layers [0, E), verify with layers [E, L), accept (Elhoushi et al. 2024, section 4.3).

    Drafting and verification share the weights, the cache, and the states after layer E: what a draft computed is not
    computed again.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
        With room for ``steps + 1`` more positions of every row.
    rows : Rows
        Advanced to the last token of what was accepted.
    exit_layer, steps : int
        E and K.
    draft_head : EarlyExitHead
        May be approximate: verification repairs it.
    min_probability : float
        A greedy draft ends before a token less probable than this; 0 where the rows draw.

    Returns
    -------
    Tensor [B, 2 + K], int64
    """
    done = model.speculate(
        rows.token,
        cache,
        exit_layer,
        steps,
        draft_head=draft_head,
        draft_threshold=min_probability,
        seq_lens=rows.seq_lens,
        slots=rows.slots,
        noise=rows.noise,
    )
    rows.token.copy_(done.next_token)
    drafts = done.tokens
    if min_probability:  # a draft that was not made has a probability, one of logits that are not finite has not
        drafts = torch.where((drafts < 0) & ~done.probability.isnan(), NOT_DRAFTED, drafts)
    return torch.cat([done.accepted[:, None], done.next_token[:, None], drafts], 1)


def advance(model: LayerSkipModel, cache: SharedKVCache, rows: Rows, depth: int) -> Tensor:
    """One token through layers [0, depth): the whole model, or an early exit with no verification.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    rows : Rows
        Advanced by the token.
    depth : int

    Returns
    -------
    Tensor [B, 2], int64
    """
    token = model.draft(
        rows.token, cache, depth, 1, extend=False, seq_lens=rows.seq_lens, slots=rows.slots, noise=rows.noise
    ).tokens  # [B, 1]
    rows.token.copy_(token[:, 0])
    rows.seq_lens.add_(1)
    return torch.cat([torch.zeros_like(token), token], 1)
