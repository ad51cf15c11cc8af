"""accept_greedy and accept_sampled on CUDA, held to the reference, and to the distribution they must leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerskip_kernels.reference import accept_greedy_ref, accept_sampled_ref

from .runners import Emulated, Ops

Args = list[Tensor | None]


def same(ops: Ops, op: str, reference: object, args: Args) -> tuple[Tensor, Tensor]:
    """Run both on copies; the outputs and the lengths must be equal. Gives the reference's."""
    mine, theirs = ([None if arg is None else arg.clone() for arg in args] for _ in range(2))
    actual, expected = getattr(ops, op)(*mine), reference(*theirs)
    for name, one, other in zip(("accepted", "next_token"), actual, expected, strict=True):
        assert one.tolist() == other.tolist(), name
    lengths = 2 if op == "accept_greedy" else 3
    assert mine[lengths].tolist() == theirs[lengths].tolist(), "seq_lens"
    return expected


@pytest.mark.parametrize(("batch", "drafted"), [(0, 3), (1, 0), (1, 1), (3, 4), (130, 2)])
def test_greedy(ops: Ops, batch: int, drafted: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    draft = torch.randint(-1, 2, (batch, drafted), generator=generator)
    target = torch.randint(-1, 2, (batch, drafted + 1), generator=generator)
    same(ops, "accept_greedy", accept_greedy_ref, [draft, target, torch.arange(batch)])


@pytest.mark.parametrize("op", ["accept_greedy", "accept_sampled"])
def test_a_length_that_cannot_advance_gives_no_token(ops: Ops, op: str) -> None:
    """The others advance as they would."""
    lengths = [-(2**63), -1, 2**63 - 2, 2**63 - 1, 7]
    args: Args = [torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64), torch.tensor(lengths)]
    if op == "accept_sampled":
        logits = torch.randn(5, 2, 9)
        logits[:, :, 0] = 50
        args = [args[0], logits[:, :1].contiguous(), logits, args[2], torch.full((5,), 0.7), torch.arange(5)]
    accepted, token = getattr(ops, op)(*args)
    assert accepted.tolist() == [0, 0, 0, 0, 1]
    assert token.tolist() == [-1, -1, -1, -1, 0]
    assert args[-1 if op == "accept_greedy" else 3].tolist() == [*lengths[:4], 9]


def problem(batch: int, drafted: int, vocab_size: int, subset: int = 0, seed: int = 0) -> Args:
    """Drafts that are often, but not always, likely; with a subset, they have tokens of it alone."""
    make = torch.Generator().manual_seed(seed)
    target = torch.randn(batch, drafted + 1, vocab_size, generator=make) * 2
    token_map = torch.randperm(vocab_size, generator=make)[:subset] if subset else None
    own = torch.arange(vocab_size) if token_map is None else token_map
    draft_logits = target[:, :drafted, own] + torch.randn(batch, drafted, len(own), generator=make)
    draft = own[(draft_logits * 2).softmax(-1).flatten(0, 1).multinomial(1, generator=make)] if drafted else None
    draft = torch.empty(batch, 0, dtype=torch.int64) if draft is None else draft.view(batch, drafted)
    temperature = torch.tensor([0.8, 1.3, 0.0, 0.3]).repeat(batch)[:batch]
    seeds = torch.arange(batch) * 2**32 + seed - 1
    return [draft, draft_logits, target, torch.arange(batch) * 5 + 1, temperature, seeds, token_map]


@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize(("batch", "drafted", "vocab_size"), [(1, 3, 41), (7, 5, 100), (4, 1, 5003), (2, 0, 77)])
def test_sampled(ops: Ops, batch: int, drafted: int, vocab_size: int, part: int) -> None:
    accepted = set()
    for seed in range(4):
        args = problem(batch, drafted, vocab_size, vocab_size // part if part else 0, seed)
        accepted |= set(same(ops, "accept_sampled", accept_sampled_ref, args)[0].tolist())
    assert drafted == 0 or len(accepted) > 1  # not all alike, or this would show little


def test_missing_drafts(ops: Ops) -> None:
    args = problem(6, 4, 50)
    for b in range(5):
        args[0][b, b:] = -1
    same(ops, "accept_sampled", accept_sampled_ref, args)


@pytest.mark.parametrize("subset", [0, 20])
def test_masked_tokens(ops: Ops, subset: int) -> None:
    """-inf in the target, in the draft, and in both; a token that the target cannot have is never accepted."""
    args = problem(8, 3, 60, subset, seed=3)
    args[2][:, :, 10:40] = float("-inf")
    args[1][:, :, :7] = float("-inf")
    own = torch.arange(60) if args[6] is None else args[6]
    args[0][:4, 0] = own[(own >= 10) & (own < 40)][0]
    accepted, token = same(ops, "accept_sampled", accept_sampled_ref, args)
    assert not accepted[:4].any()
    assert not ((token >= 10) & (token < 40)).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_name_no_token(ops: Ops, value: float) -> None:
    """In the target's and in the draft's rows, before and after the first rejection."""
    for row in range(4):
        args = problem(8, 3, 60, seed=5)
        args[2][:4, row, 13] = value
        if row < 3:
            args[1][4:, row, 59] = value
        same(ops, "accept_sampled", accept_sampled_ref, args)
    args = problem(4, 2, 60)
    args[2][:, 0] = float("-inf")  # no token is left at all
    _, token = same(ops, "accept_sampled", accept_sampled_ref, args)
    assert token.tolist() == [-1] * 4


def test_equal_rows_accept_all(ops: Ops) -> None:
    """p = q: the ratio is 1, and u may be 1 only once in 2^25; the token after them is a sample of p."""
    args = problem(6, 4, 90)
    args[1] = args[2][:, :4].clone()
    args[4] = torch.full((6,), 0.9)
    accepted, _ = same(ops, "accept_sampled", accept_sampled_ref, args)
    assert accepted.tolist() == [4] * 6


def test_the_first_token_has_the_target_as_its_distribution(ops: Ops) -> None:
    """Accepted or drawn from the residual; 24.3 is the 0.999 quantile of chi-square with 7 degrees of freedom."""
    count, vocab_size = 1000, 8
    target, draft_logits = torch.linspace(-1, 1, vocab_size), torch.linspace(1, -0.5, vocab_size)
    make = torch.Generator().manual_seed(2)
    draft = draft_logits.softmax(0).multinomial(count, replacement=True, generator=make)[:, None]
    args = [
        draft, draft_logits.expand(count, 1, -1).contiguous(), target.expand(count, 2, -1).contiguous(),
        torch.arange(count) * 2, torch.ones(count), torch.full((count,), 9),
    ]  # fmt: skip
    accepted, token = ops.accept_sampled(*args)
    first = torch.where(accepted > 0, draft[:, 0], token)
    expected = target.softmax(0) * count
    assert ((first.bincount(minlength=vocab_size) - expected) ** 2 / expected).sum() < 24.3
    assert 0.3 < (accepted > 0).float().mean() < 0.8


@pytest.mark.parametrize("subset", [0, 37])
def test_schedules_and_architectures_agree(emulated: type[Emulated], subset: int) -> None:
    for seed, arch in ((1, 90), (2, 80), (3, 80)):
        same(emulated(seed, arch), "accept_sampled", accept_sampled_ref, problem(3, 4, 4200, subset))
