"""What a draft is to learn: the full model's most probable token, and its distribution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE_VALUES = 1 << 22  # logits that are in memory at a time
_SMALL = 1e-6


class Targets(NamedTuple):
    """Labels in terms of the head's rows, -1 for a token that the head lacks.

    ``token`` [R], ``ids`` [R, k] int64, their ``probabilities`` [R, k] fp32.
    """

    token: Tensor
    ids: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, ids: Tensor, probabilities: Tensor, token_ids: Tensor | None) -> Targets:
        """Of `Labels`' fields, for a head of some tokens or of all."""
        ids = ids.long()
        if token_ids is not None:
            places = torch.searchsorted(token_ids, ids).clamp_(max=len(token_ids) - 1)
            ids = torch.where(token_ids[places] == ids, places, -1)
        return cls(ids[:, 0], ids, probabilities.float())


def row_losses(logits: Tensor, targets: Targets, soft: float) -> Tensor:
    """(1 - soft) · CE of the arg-max + soft · KL of the full model's distribution p from the draft's q, [R].

    The KL is over the k most probable tokens and all others as one, with p's entropy left out, which no gradient sees:
    -Σᵢ pᵢ log qᵢ - (1 - Σᵢ pᵢ) log(1 - Σᵢ qᵢ). Tokens that the head lacks count among the others; a row whose
    arg-max it lacks has no CE.
    """
    logs = logits.float().log_softmax(1)
    hard = torch.where(targets.token >= 0, -logs.gather(1, targets.token.clamp(min=0)[:, None])[:, 0], 0)
    if not soft:
        return hard
    there = targets.ids >= 0
    picked = logs.gather(1, targets.ids.clamp(min=0))
    p = torch.where(there, targets.probabilities, 0)
    q_others = 1 - torch.where(there, picked.exp(), 0).sum(1)
    others = (1 - p.sum(1)).clamp(min=0) * q_others.clamp(min=_SMALL).log()
    return (1 - soft) * hard - soft * ((p * picked).sum(1) + others)


class _TiledLoss(torch.autograd.Function):
    """The mean of `row_losses`; gradients are made tile by tile in the forward, so that no [R, S] tensor is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, low: Tensor | None, up: Tensor | None, targets: Targets, soft: float
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grads = [None if one is None else torch.zeros_like(one) for one in (hidden, low, up)]
        step = max(1, TILE_VALUES // len(head))
        for begin in range(0, len(hidden), step):
            rows = slice(begin, begin + step)
            logits = (hidden[rows] @ head.T).float()
            if low is not None and up is not None:
                logits += low[rows].float() @ up.float().T
            with torch.enable_grad():
                logits.requires_grad_()
                loss = row_losses(logits, Targets(*(part[rows] for part in targets)), soft).sum() / len(hidden)
                (slope,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            slope = slope.to(hidden.dtype)
            grads[0][rows] = slope @ head  # type: ignore[index]
            if low is not None and up is not None:
                grads[1][rows] = slope.to(up.dtype) @ up  # type: ignore[index]
                grads[2] += slope.to(low.dtype).T @ low[rows]  # type: ignore[operator]
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        by_hidden, by_low, by_up = (None if one is None else one * slopes[0] for one in ctx.grads)
        return by_hidden, None, by_low, by_up, None, None


def draft_loss(
    hidden: Tensor, head: Tensor, targets: Targets, soft: float, correction: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Mean of `row_losses` for normed states and a frozen head; memory is that of a tile of the logits.

    Parameters
    ----------
    hidden : Tensor [R, D]
    head : Tensor [S, D]
        Gets no gradient.
    targets : Targets
    soft : float
        Weight of the KL, in [0, 1].
    correction : (Tensor [R, r], Tensor [S, r]), optional
        Their product is added to the logits.

    Returns
    -------
    Tensor, scalar fp32
    """
    low, up = correction if correction is not None else (None, None)
    loss: Tensor = _TiledLoss.apply(hidden, head, low, up, targets, soft)
    return loss


@torch.no_grad()
def draft_tokens(hidden: Tensor, head: Tensor, correction: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The head's row that each state drafts, [R] int64."""
    low, up = correction if correction is not None else (None, None)
    step = max(1, TILE_VALUES // len(head))
    found = []
    for begin in range(0, len(hidden), step):
        logits = (hidden[begin : begin + step] @ head.T).float()
        if low is not None and up is not None:
            logits += low[begin : begin + step].float() @ up.float().T
        found.append(logits.argmax(1))
    return torch.cat(found)
