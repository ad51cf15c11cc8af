"""The sequences of one round, as the tensors that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Entry b of every tensor belongs to sequence b of the round; the tensors stay, a round rewrites the first two.

    Attributes
    ----------
    token : Tensor [B], int64
        The last token of each sequence, which is not in the cache yet.
    seq_lens : Tensor [B], int64
        Its position: how much of the sequence the cache holds.
    slots : Tensor [B], int64
        The cache's row.
    seed : Tensor [B], int64
        Names, with the position, the noise that tokens are drawn with.
    temperature : Tensor [B], fp32, or None
        None where every sequence is greedy.
    """

    token: Tensor
    seq_lens: Tensor
    slots: Tensor
    seed: Tensor
    temperature: Tensor | None = None

    @property
    def noise(self) -> tuple[Tensor, Tensor] | None:
        """What tokens are drawn with; None where every sequence is greedy."""
        return None if self.temperature is None else (self.temperature, self.seed)

    def clone(self) -> Rows:
        """The same values elsewhere."""
        temperature = None if self.temperature is None else self.temperature.clone()
        return Rows(self.token.clone(), self.seq_lens.clone(), self.slots.clone(), self.seed.clone(), temperature)

    def copy_(self, other: Rows) -> None:
        """Take the values of ``other``, which has as many rows and as much of a temperature."""
        mine, theirs = ([rows.token, rows.seq_lens, rows.slots, rows.seed] for rows in (self, other))
        torch._foreach_copy_(mine, theirs)  # one launch
        if self.temperature is not None:
            assert other.temperature is not None
            self.temperature.copy_(other.temperature)

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        seq_lens: Sequence[int],
        slots: Sequence[int],
        seeds: Sequence[int],
        temperatures: Sequence[float],
        device: torch.device,
    ) -> Rows:
        """The tensors of what the host knows."""
        token, lengths, places, seed = torch.tensor([tokens, seq_lens, slots, seeds], device=device).unbind()
        temperature = torch.tensor(temperatures, dtype=torch.float32, device=device) if any(temperatures) else None
        return cls(token, lengths, places, seed, temperature)
