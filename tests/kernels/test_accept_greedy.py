"""`accept_greedy`: leading matches, the token after them, lengths advanced in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk

from .common import Inputs


def by_hand(draft: Tensor, target: Tensor, seq_lens: Tensor) -> tuple[list[int], list[int], list[int]]:
    accepted, following = [], []
    for drafted, wanted in zip(draft.tolist(), target.tolist(), strict=True):
        count = 0
        while count < len(drafted) and drafted[count] >= 0 and drafted[count] == wanted[count]:
            count += 1
        accepted.append(count)
        following.append(wanted[count])
    return accepted, following, [old + count + 1 for old, count in zip(seq_lens.tolist(), accepted, strict=True)]


def check(draft: Tensor, target: Tensor, seq_lens: Tensor) -> None:
    accepted, following, advanced = by_hand(draft, target, seq_lens)
    out = lk.accept_greedy(draft, target, seq_lens)
    assert out.accepted.tolist() == accepted
    assert out.accepted.dtype == torch.int64
    assert out.next_token.tolist() == following
    assert out.next_token.dtype == torch.int64
    assert seq_lens.tolist() == advanced


@pytest.mark.parametrize(
    ("draft", "target", "accepted"),
    [
        ([5, 6, 7], [5, 6, 7, 8], 3),
        ([5, 6, 7], [4, 6, 7, 8], 0),
        ([5, 6, 7], [5, 9, 7, 8], 1),  # a match after a mismatch counts for nothing
        ([5, -1, -1], [5, -1, -1, 8], 1),  # slots that were not drafted, beside a target that is -1 too
        ([-1], [-1, 3], 0),
        ([], [3], 0),
        ([2**40], [2**40, 1], 1),
    ],
)
def test_known_rounds(path: str, draft: list[int], target: list[int], accepted: int) -> None:
    seq_lens = torch.tensor([11])
    drafted = torch.tensor([draft], dtype=torch.int64).view(1, len(draft))
    out = lk.accept_greedy(drafted, torch.tensor([target]), seq_lens)
    assert (out.accepted.item(), out.next_token.item(), seq_lens.item()) == (accepted, target[accepted], 12 + accepted)


@pytest.mark.parametrize("drafted", [0, 1, 2, 7, 8, 16])
@pytest.mark.parametrize("batch", [0, 1, 2, 41])
def test_random_batches(path: str, batch: int, drafted: int) -> None:
    make = Inputs(torch.float32, seed=drafted)
    draft, target = make.integers(-1, 2, batch, drafted), make.integers(-1, 2, batch, drafted + 1)
    check(draft, target, make.integers(0, 99, batch))


def test_strided_tokens(path: str) -> None:
    make = Inputs(torch.float32)
    draft, target = make.integers(0, 2, 9, 4), make.integers(0, 2, 9, 5)
    check(draft.T.contiguous().T, target.T.contiguous().T, torch.arange(9))
    check(draft[::2], target[::2], torch.arange(5))


def test_inputs_are_unchanged(path: str) -> None:
    draft, target, seq_lens = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]]), torch.tensor([4])
    out = lk.accept_greedy(draft, target, seq_lens)
    assert draft.tolist() == [[1, 2]]
    assert target.tolist() == [[1, 2, 3]]
    assert len({tensor.data_ptr() for tensor in (draft, target, seq_lens, *out)}) == 5
