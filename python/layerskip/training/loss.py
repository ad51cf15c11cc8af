"""The early-exit loss of a model: shifts labels, gathers the rows that have one, calls the fused op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import layerskip_kernels

from ..models.head import NormForm

IGNORE = -100


class ExitLosses(NamedTuple):
    """Of one batch: ``loss``, a scalar; ``exit_losses`` [N], detached means; ``num_labels`` of it."""

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

    Parameters
    ----------
    norm, head : nn.Module
        The model's own final norm and head, of which the ``weight`` is used; they stay the model's.
    eps : float
        Of the norm.
    norm_form : NormForm, optional
        How its weight is kept, if not as it is.
    """

    def __init__(self, norm: Any, head: Any, eps: float, norm_form: NormForm | None = None) -> None:
        self.norm, self.head, self.eps, self.norm_form = norm, head, eps, norm_form

    def gather(self, states: Sequence[Tensor], rows: Tensor) -> Tensor:
        """The rows [N, R, D] of the states, in the dtype that matmuls run in."""
        dtype = states[0].dtype
        if torch.is_autocast_enabled(states[0].device.type):
            dtype = torch.get_autocast_dtype(states[0].device.type)
        return torch.stack([state.flatten(0, 1).index_select(0, rows) for state in states]).to(dtype)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Norm and head weight, read anew: a sharded model swaps them."""
        norm = self.norm.weight if self.norm_form is None else self.norm_form.of(self.norm.weight)
        return norm.to(dtype), self.head.weight.to(dtype)

    def on_rows(
        self, hiddens: Tensor, targets: Tensor, exit_weights: Tensor, sample: Tensor | None = None, sampled: int = 0
    ) -> ExitLosses:
        """Loss of gathered rows [N, R, D] with targets [R].

        The first ``sampled`` exits choose among the tokens ``sample`` [S] alone, ascending, which must have all targets
        in it: that costs S/V of the head. Their losses are too low by what the other tokens would have got.
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
        return ExitLosses(total, torch.cat([out.exit_losses for out in outs]), targets.shape[0])

    @torch.no_grad()
    def choices(self, hiddens: Tensor) -> Tensor:
        """The token that each exit would choose, [N, R]."""
        exits, rows, width = hiddens.shape
        norm, head = self.weights(hiddens.dtype)
        return layerskip_kernels.exit_head(hiddens.detach().reshape(-1, width), norm, head, self.eps).token.view(
            exits, rows
        )
