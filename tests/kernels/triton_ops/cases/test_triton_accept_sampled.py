"""accept_sampled against the reference, which makes the same noise: the same drafts, the same next token."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton_cases import normal, on_backend

import layerskip_kernels as lk


class Case(NamedTuple):
    """The op's arguments, in its order."""

    draft: Tensor
    draft_logits: Tensor
    target_logits: Tensor
    seq_lens: Tensor
    temperature: Tensor
    seed: Tensor
    token_map: Tensor | None


def make(seed: int, batch: int, drafted: int, vocab_size: int, scored: int | None, device: torch.device) -> Case:
    """Drafts drawn from logits that resemble the target's, of every token or of ``scored``; every fourth is greedy."""
    generator = torch.Generator().manual_seed(seed)
    target = normal(seed, batch, drafted + 1, vocab_size, device=device, by=2.0)
    token_map = None if scored is None else torch.randperm(vocab_size, generator=generator)[:scored].to(device)
    q = target[:, :drafted] if token_map is None else target[:, :drafted, token_map]
    q = q + normal(seed + 1, *q.shape, device=device, by=0.5)
    temperature = torch.tensor([0.5, 1.0, 1.5, 0.0])[torch.arange(batch) % 4].to(device)
    scaled = q / torch.where(temperature > 0, temperature, 1e-3)[:, None, None]
    column = torch.multinomial(scaled.cpu().softmax(-1).flatten(0, 1), 1, generator=generator).view(batch, drafted)
    draft = column.to(device) if token_map is None else token_map[column.to(device)]
    lengths, seeds = (torch.randint(0, high, (batch,), generator=generator).to(device) for high in (900, 2**62))
    return Case(draft, q, target, lengths, temperature, seeds, token_map)


def agrees(case: Case) -> lk.Acceptance:
    (ours, our_args), (truth, true_args) = (
        on_backend(one, lk.accept_sampled, *case) for one in ("triton", "reference")
    )
    assert ours.accepted.tolist() == truth.accepted.tolist()
    assert ours.next_token.tolist() == truth.next_token.tolist()
    assert our_args[3].tolist() == true_args[3].tolist()
    return ours


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        module = import_module("layerskip_kernels.triton.accept_sampled")
        for name, value in (("ROW_BLOCK", 32), ("TILE", 16), ("FINISH_BLOCK", 2)):
            monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize(("drafted", "vocab_size", "scored"), [(0, 37, None), (3, 50, None), (2, 75, 21), (1, 1, None)])
def test_accept_sampled(drafted: int, vocab_size: int, scored: int | None, device: torch.device) -> None:
    agrees(make(drafted, 12, drafted, vocab_size, scored, device))


def test_every_number_of_drafts_is_accepted_at_some_time(device: torch.device) -> None:
    """So the cases above are not all of one kind."""
    accepted = agrees(make(5, 24, 2, 20, 12, device)).accepted
    assert set(accepted.tolist()) == {0, 1, 2}


def test_missing_drafts(device: torch.device) -> None:
    """After the last draft comes a token of the target itself, not of what the draft leaves of it."""
    case = make(1, 8, 3, 20, None, device)
    case.draft[:, 2] = -1
    case.draft[::2, 0] = -1
    out = agrees(case)
    assert (out.accepted[::2] == 0).all()
    assert int(out.accepted.max()) == 2


def test_drafts_from_the_target_distribution_are_always_accepted(device: torch.device) -> None:
    case = make(2, 8, 3, 20, None, device)
    case = case._replace(draft_logits=case.target_logits[:, :3].contiguous())
    out = agrees(case)
    assert (out.accepted[case.temperature > 0] == 3).all()


def test_masked_tokens(device: torch.device) -> None:
    """-inf in the target forbids a token, in the draft it only keeps it from being drafted."""
    case = make(3, 12, 2, 30, None, device)
    case.target_logits[:, :, 5:25] = float("-inf")
    case.draft_logits[:, :, :3] = float("-inf")
    out = agrees(case)
    assert ((out.next_token < 5) | (out.next_token >= 25)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_have_no_distribution(value: float, device: torch.device) -> None:
    case = make(4, 8, 2, 20, None, device)
    case.target_logits[0, 0] = value
    case.target_logits[1, 2, 7 if value > float("-inf") else slice(None)] = value
    case.draft_logits[2, 1] = value
    case.draft_logits[3, 0] = value  # greedy, so nobody asks
    out = agrees(case)
    assert int(out.next_token[0]) == -1
    assert int(out.next_token[3]) >= 0


def test_greedy_rows_match_accept_greedy(device: torch.device) -> None:
    case = make(6, 8, 3, 20, None, device)
    case = case._replace(draft=case.target_logits[:, :3].argmax(-1), temperature=torch.zeros_like(case.temperature))
    case.draft[::3, 1] = 19
    out, _ = on_backend("triton", lk.accept_sampled, *case)
    greedy, _ = on_backend("triton", lk.accept_greedy, case.draft, case.target_logits.argmax(-1), case.seq_lens)
    assert out.accepted.tolist() == greedy.accepted.tolist()
    assert out.next_token.tolist() == greedy.next_token.tolist()


def test_a_sequence_does_not_depend_on_the_batch(device: torch.device) -> None:
    case = make(7, 6, 2, 40, 17, device)
    together, _ = on_backend("triton", lk.accept_sampled, *case)
    for b in range(6):
        alone = Case(*(one[b : b + 1] for one in case[:6]), case.token_map)
        out, _ = on_backend("triton", lk.accept_sampled, *alone)
        assert (int(out.accepted), int(out.next_token)) == (int(together.accepted[b]), int(together.next_token[b]))


def test_no_sequences(device: torch.device) -> None:
    case = make(0, 1, 2, 9, None, device)
    empty = Case(*(one[:0] for one in case[:6]), None)
    assert agrees(empty).accepted.shape == (0,)
