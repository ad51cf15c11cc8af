"""The loss of `layerskip train-exit`, against its formulas in float64 and against the op that accepts drafts."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import layerskip_kernels
from layerskip.training import losses
from layerskip.training.losses import (
    LossWeights,
    Targets,
    acceptance_probabilities,
    draft_agreement,
    draft_loss,
    row_losses,
)


class Case(NamedTuple):
    """Seven rows, a head of the even ones of 40 tokens, a correction of it, and four labels a row."""

    hidden: Tensor
    head: Tensor
    low: Tensor
    up: Tensor
    ids: Tensor
    probabilities: Tensor

    @property
    def targets(self) -> Targets:
        return Targets.of(self.ids, self.probabilities, torch.arange(0, 40, 2))


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(losses, "TILE_VALUES", 3 * 20)  # tiles of 3 rows
    source = torch.Generator().manual_seed(0)
    sizes = ((7, 8), (20, 8), (7, 2), (20, 2))
    ids = torch.stack([torch.randperm(40, generator=source)[:4] for _ in range(7)])
    probabilities = torch.rand(7, 4, generator=source).sort(1, descending=True).values / 5
    made = Case(*(torch.randn(*size, generator=source) for size in sizes), ids, probabilities)
    assert (made.targets.token < 0).any()
    assert (made.targets.token >= 0).any()
    return made


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.0, 1.0), (0.2, 0.5)])
def test_draft_loss_has_the_gradients_of_its_formula(weights: tuple[float, float], case: Case) -> None:
    (hidden, head, low, up, *_), targets = case, case.targets
    mine = [one.clone().requires_grad_() for one in (hidden, low, up)]
    true = [one.clone().requires_grad_() for one in (hidden, low, up)]
    loss = draft_loss(mine[0], head, targets, LossWeights(*weights), (mine[1], mine[2]))
    loss.backward()
    expected = row_losses(true[0] @ head.T + true[1] @ true[2].T, targets, LossWeights(*weights)).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(mine, true, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_total_variation_is_that_of_float64_as_are_its_gradients(case: Case) -> None:
    """½ Σ |p - q| over the four tokens, of which the head lacks some, and all other tokens as one."""
    mine = [one.clone().requires_grad_() for one in (case.hidden, case.low, case.up)]
    loss = draft_loss(mine[0], case.head, case.targets, LossWeights(0.0, 1.0), (mine[1], mine[2]))
    loss.backward()
    true = [one.detach().double().requires_grad_() for one in mine]
    q = (true[0] @ case.head.double().T + true[1] @ true[2].T).softmax(1)
    q = torch.stack([q, torch.zeros_like(q)], 2).flatten(1).gather(1, case.ids)  # the odd tokens have none
    p = case.probabilities.double()
    others = (1 - p.sum(1)) - (1 - q.sum(1))
    distance = ((p - q).abs().sum(1) + others.abs()) / 2
    distance.mean().backward()
    torch.testing.assert_close(loss.double(), distance.mean(), rtol=1e-6, atol=0)
    for one, other in zip(mine, true, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-8)
    found = draft_agreement(case.hidden, case.head, case.targets, (case.low, case.up))
    torch.testing.assert_close(found.acceptance.double(), 1 - distance, rtol=1e-6, atol=0)


def test_acceptances_are_how_often_sampled_drafts_are_accepted() -> None:
    """By the op, on 40 000 rows; the draft knows 8 of 12 tokens."""
    source = torch.Generator().manual_seed(0)
    rows, known = 40_000, torch.tensor([0, 1, 3, 4, 6, 8, 9, 11])
    full, own = torch.randn(12, generator=source), torch.randn(8, generator=source)
    ids = full.argsort(descending=True)[None]
    targets = Targets.of(ids, full.softmax(0)[ids], known)
    expected = float(acceptance_probabilities(own.log_softmax(0)[None], targets))
    drawn = torch.multinomial(own.softmax(0), rows, replacement=True, generator=source)
    accepted = layerskip_kernels.accept_sampled(
        known[drawn][:, None], own.expand(rows, 1, 8).contiguous(), full.expand(rows, 2, 12).contiguous(),
        torch.zeros(rows, dtype=torch.int64), torch.ones(rows), torch.arange(rows), known,
    ).accepted  # fmt: skip
    deviation = (expected * (1 - expected) / rows) ** 0.5
    assert 0.2 < expected < 0.8
    assert float(accepted.float().mean()) == pytest.approx(expected, abs=4 * deviation)


def test_row_losses_by_hand() -> None:
    """q = (1/2, 1/4, 1/4); p = (3/4, 1/8) of tokens 0 and 1, 1/8 of a token that the head lacks."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    targets = Targets(torch.tensor([0]), torch.tensor([[0, 1, -1]]), torch.tensor([[0.75, 0.125, 0.125]]))
    hard = -torch.tensor(0.5).log()
    soft = -(0.75 * torch.tensor(0.5).log() + 0.125 * torch.tensor(0.25).log() + 0.125 * torch.tensor(0.25).log())
    variation = 1 - (0.5 + 0.125 + 0 + 0)  # the draft's rest, 1/4, is for tokens that the full model never chooses
    for weights, expected in {(0, 0): hard, (1, 0): soft, (0, 1): variation}.items():
        assert float(row_losses(logits, targets, LossWeights(*weights))) == pytest.approx(float(expected))
    mixed = 0.5 * hard + 0.25 * soft + 0.25 * variation
    assert float(row_losses(logits, targets, LossWeights(0.25, 0.25))) == pytest.approx(float(mixed))
