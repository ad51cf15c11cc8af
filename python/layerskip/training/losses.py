"""Early-exit loss of a model, and the distillation loss of an exit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import layerskip_kernels

from ..models.head import NormSpec

IGNORE = -100


class ExitLosses(NamedTuple):
    """Scalar ``loss`` of a batch, detached mean ``exit_losses`` [N], and ``num_labels``."""

    loss: Tensor
    exit_losses: Tensor
    num_labels: int


def target_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices, into [B · S], of the positions whose next token is labelled, and those labels; both [R]."""
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)
    rows = (shifted != IGNORE).nonzero()[:, 0]
    return rows, shifted[rows]


class ExitHeadLoss:
    """J = Σ weightₙ · CE(head(norm(x_n)), next token), x_n the state after exit layer n (arXiv 2404.16710, §4.1.2).

    ``norm`` and ``head`` are the model's own modules, ``norm_spec`` how the model stores its norm weight.
    """

    def __init__(self, norm: Any, head: Any, eps: float, norm_spec: NormSpec | None = None) -> None:
        self.norm, self.head, self.eps, self.norm_spec = norm, head, eps, norm_spec

    def gather(self, states: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Gather the rows [N, R, D] of the states, in the dtype that matmuls run in."""
        dtype = states[0].dtype
        if torch.is_autocast_enabled(states[0].device.type):
            dtype = torch.get_autocast_dtype(states[0].device.type)
        return torch.stack([state.flatten(0, 1).index_select(0, rows) for state in states]).to(dtype)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Norm and head weight, read on every call: a sharded model swaps them."""
        norm = self.norm.weight if self.norm_spec is None else self.norm_spec.apply(self.norm.weight)
        return norm.to(dtype), self.head.weight.to(dtype)

    def on_rows(
        self, hiddens: Tensor, targets: Tensor, exit_weights: Tensor, sample: Tensor | None = None, sampled: int = 0
    ) -> ExitLosses:
        """Loss of gathered rows [N, R, D] with targets [R].

        The first ``sampled`` exits choose among the tokens ``sample`` [S] alone, which ascend and have all targets
        among them. That costs S/V of the head; their losses are too low by the probability of the other tokens.
        """
        norm, head = self.weights(hiddens.dtype)
        parts = []
        if sample is not None and sampled:
            places = torch.searchsorted(sample, targets).clamp(max=len(sample) - 1)
            if not torch.equal(sample[places], targets):
                raise ValueError("the sampled vocabulary lacks a target")
            rows = head.index_select(0, sample)
            parts.append((hiddens[:sampled], norm, rows, places, exit_weights[:sampled]))
        else:
            sampled = 0
        if sampled < len(hiddens):
            parts.append((hiddens[sampled:], norm, head, targets, exit_weights[sampled:]))
        outs = [layerskip_kernels.early_exit_loss(*part, self.eps, IGNORE) for part in parts]
        total = torch.stack([out.loss for out in outs]).sum()
        return ExitLosses(total, torch.cat([out.exit_losses.detach() for out in outs]), targets.shape[0])

    @torch.no_grad()
    def choices(self, hiddens: Tensor) -> Tensor:
        """The arg-max of each exit, [N, R]."""
        exits, rows, width = hiddens.shape
        norm, head = self.weights(hiddens.dtype)
        return layerskip_kernels.exit_head(hiddens.detach().reshape(-1, width), norm, head, self.eps).token.view(
            exits, rows
        )


TILE_VALUES = 1 << 22  # logits that are in memory at a time
_SMALL = 1e-6


class Targets(NamedTuple):
    """Teacher top-k as rows of the head, -1 for a token that the head lacks.

    ``token`` [R], the arg-max; ``ids`` [R, k] int64; their ``probabilities`` [R, k] fp32.
    """

    token: Tensor
    ids: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, ids: Tensor, probabilities: Tensor, token_ids: Tensor | None) -> Targets:
        """Map token ids to the rows of a head for ``token_ids``, or for all."""
        ids = ids.long()
        if token_ids is not None:
            places = torch.searchsorted(token_ids, ids).clamp_(max=len(token_ids) - 1)
            ids = torch.where(token_ids[places] == ids, places, -1)
        return cls(ids[:, 0], ids, probabilities.float())

    def rows(self, rows: slice) -> Targets:
        return Targets(*(part[rows] for part in self))


class LossWeights(NamedTuple):
    """Weights of the parts of `row_losses`; the cross-entropy has the rest of 1."""

    soft: float
    total_variation: float


class RowAgreement(NamedTuple):
    """For each row, whether the draft token is the full model's arg-max, and its acceptance probability, [R]."""

    agrees: Tensor
    acceptance: Tensor


def row_losses(logits: Tensor, targets: Targets, weights: LossWeights) -> Tensor:
    """(1 - s - v) · CE of the arg-max + s · KL of the full model's distribution p from the draft's q + v · TV, [R].

    s and v are the weights. A row whose arg-max the head lacks has no CE. TV = 1 - `acceptance_probabilities`.
    """
    logs = logits.float().log_softmax(1)
    hard = torch.where(targets.token >= 0, -logs.gather(1, targets.token.clamp(min=0)[:, None])[:, 0], 0)
    losses = (1 - weights.soft - weights.total_variation) * hard
    if weights.soft:
        losses = losses + weights.soft * _divergences(logs, targets)
    if weights.total_variation:
        losses = losses + weights.total_variation * (1 - acceptance_probabilities(logs, targets))
    return losses


def _divergences(logs: Tensor, targets: Targets) -> Tensor:
    """KL of p from q, whose logarithms ``logs`` [R, S] are, [R].

    Over the k most probable tokens and all others as one, without p's entropy, which has no gradient:
    -Σᵢ pᵢ log qᵢ - (1 - Σᵢ pᵢ) log(1 - Σᵢ qᵢ). Tokens that the head lacks count among the others.
    """
    there = targets.ids >= 0
    picked = logs.gather(1, targets.ids.clamp(min=0))
    p = torch.where(there, targets.probabilities, 0)
    q_others = _rest(torch.where(there, picked.exp(), 0))
    others = _rest(p) * q_others.clamp(min=_SMALL).log()
    return -((p * picked).sum(1) + others)


def acceptance_probabilities(logs: Tensor, targets: Targets) -> Tensor:
    """Σ min(p, q) = 1 - TV(p, q), [R]: the acceptance probability of a draft from q (Leviathan et al. 2023).

    ``logs`` [R, S] are q's logarithms. The k most probable tokens count one by one, all others as one, so the result is
    too high by at most their probability. Where the head lacks a token, q is 0.
    """
    p = targets.probabilities
    q = torch.where(targets.ids >= 0, logs.gather(1, targets.ids.clamp(min=0)).exp(), 0)
    return torch.minimum(p, q).sum(1) + torch.minimum(_rest(p), _rest(q))


def _rest(probabilities: Tensor) -> Tensor:
    return (1 - probabilities.sum(1)).clamp(min=0)


def _tiles(hidden: Tensor, head: Tensor, correction: tuple[Tensor, Tensor] | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield tiles of rows with their logits in fp32."""
    step = max(1, TILE_VALUES // len(head))
    for begin in range(0, len(hidden), step):
        rows = slice(begin, begin + step)
        logits = (hidden[rows] @ head.T).float()
        if correction is not None:
            low, up = correction
            logits += low[rows].float() @ up.float().T
        yield rows, logits


class _TiledLoss(torch.autograd.Function):
    """Mean of `row_losses`; the forward computes the gradients tile by tile, so there is never an [R, S] tensor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, low: Tensor | None, up: Tensor | None, targets: Targets,
        weights: LossWeights,
    ) -> Tensor:  # fmt: skip
        correction = None if low is None or up is None else (low, up)
        total = hidden.new_zeros((), dtype=torch.float32)
        grads = [None if one is None else torch.zeros_like(one) for one in (hidden, low, up)]
        for rows, logits in _tiles(hidden, head, correction):
            with torch.enable_grad():
                logits.requires_grad_()
                loss = row_losses(logits, targets.rows(rows), weights).sum() / len(hidden)
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
    hidden: Tensor, head: Tensor, targets: Targets, weights: LossWeights,
    correction: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Mean of `row_losses`, a scalar in fp32, for normed states [R, D]; memory is that of a tile of the logits.

    The ``head`` [S, D] gets no gradient. The product of ``correction``, [R, r] and [S, r], is added to the logits. The
    weights and their sum are in [0, 1].
    """
    low, up = correction if correction is not None else (None, None)
    loss: Tensor = _TiledLoss.apply(hidden, head, low, up, targets, weights)
    return loss


@torch.no_grad()
def draft_agreement(
    hidden: Tensor, head: Tensor, targets: Targets, correction: tuple[Tensor, Tensor] | None = None
) -> RowAgreement:
    """Compare the draft token of each state with the full model; arguments as for `draft_loss`."""
    found = []
    for rows, logits in _tiles(hidden, head, correction):
        own = targets.rows(rows)
        found.append((logits.argmax(1) == own.token, acceptance_probabilities(logits.log_softmax(1), own)))
    return RowAgreement(*(torch.cat(parts) for parts in zip(*found, strict=True)))
