"""A round's work on the device: on fixed tensors, and no value comes to the host.

Every round gives one tensor [B, 2 + K] int64, which is all that the host reads afterwards: how many drafts it accepted,
the token that follows them, the K drafts. A token is -1 where logits are not finite; a draft is `NOT_DRAFTED` where
none was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_kernels import Noise

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache

NOT_DRAFTED = -2


@dataclass(frozen=True)
class SequenceTensors:
    """The state of the sequences of a round: entry b of every tensor belongs to sequence b.

    A round rewrites the first two tensors in place.

    Attributes
    ----------
    token : Tensor [B], int64
        The last token of each sequence, which is not in the cache yet.
    seq_lens : Tensor [B], int64
        Its position, which is also how many positions the cache holds.
    slots : Tensor [B], int64
        The cache row of each sequence.
    seed : Tensor [B], int64
        Seed and position determine the noise that a token is drawn with.
    temperature : Tensor [B], fp32, or None
        None where every sequence is greedy.
    """

    token: Tensor
    seq_lens: Tensor
    slots: Tensor
    seed: Tensor
    temperature: Tensor | None = None

    @property
    def noise(self) -> Noise | None:
        """Temperature and seed as the kernels take them, or None where every sequence is greedy."""
        return None if self.temperature is None else Noise(self.temperature, self.seed)

    def clone(self) -> SequenceTensors:
        """The same values in new tensors."""
        temperature = None if self.temperature is None else self.temperature.clone()
        return SequenceTensors(
            self.token.clone(), self.seq_lens.clone(), self.slots.clone(), self.seed.clone(), temperature
        )

    def copy_(self, other: SequenceTensors) -> None:
        """Take the values of ``other``, which has the same shapes."""
        mine, theirs = ([one.token, one.seq_lens, one.slots, one.seed] for one in (self, other))
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
    ) -> SequenceTensors:
        """The tensors of values that the host knows."""
        token, lengths, cache_rows, seed = torch.tensor([tokens, seq_lens, slots, seeds], device=device).unbind()
        temperature = torch.tensor(temperatures, dtype=torch.float32, device=device) if any(temperatures) else None
        return cls(token, lengths, cache_rows, seed, temperature)


class FusedRound:
    """Rounds in which one fused call drafts, verifies and chooses the tokens, and no logits are written.

    `LogitsRound` has the same methods, for sequences whose logits are processed.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
        With room for K + 1 more positions of every sequence.
    draft_head : EarlyExitHead
        May be approximate, since verification corrects it.
    """

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache, draft_head: EarlyExitHead) -> None:
        self._model, self._cache, self._draft_head = model, cache, draft_head

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index: there are none."""
        return {}

    def first(self, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """The tokens [B] that follow the prompts, from the states [B, D] of the prompts' last tokens.

        ``sequences.seq_lens`` are the positions of these last tokens.
        """
        if sequences.noise is None:
            return self._model.head(hidden).token
        return self._model.head(hidden, *sequences.noise, sequences.seq_lens).token

    def advance(self, sequences: SequenceTensors, exit_layer: int) -> Tensor:
        """Decode one token with layers [0, exit_layer): with all layers, or with an early exit and no verification.

        Parameters
        ----------
        sequences : SequenceTensors
            Advanced by the token.
        exit_layer : int

        Returns
        -------
        Tensor [B, 2], int64
        """
        token = self._model.draft(
            sequences.token,
            self._cache,
            exit_layer,
            1,
            extend=False,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
        ).tokens  # [B, 1]
        sequences.token.copy_(token[:, 0])
        sequences.seq_lens.add_(1)
        return torch.cat([torch.zeros_like(token), token], 1)

    def speculate(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Tensor:
        """Draft with layers [0, E), verify with layers [E, L), accept (Elhoushi et al. 2024, section 4.3).

        Drafting and verification share the weights, the cache and the states after layer E, so nothing that a draft
        computed is computed again.

        Parameters
        ----------
        sequences : SequenceTensors
            Advanced to the last token of what was accepted.
        exit_layer, num_speculations : int
            E and K.
        draft_threshold : float
            A greedy draft ends before a token less probable than this; 0 where sequences draw.

        Returns
        -------
        Tensor [B, 2 + K], int64
        """
        done = self._model.speculate(
            sequences.token,
            self._cache,
            exit_layer,
            num_speculations,
            draft_head=self._draft_head,
            draft_threshold=draft_threshold,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
        )
        sequences.token.copy_(done.next_token)
        drafts = done.tokens
        if draft_threshold:  # a draft that was not made has a probability; one of logits that are not finite has NaN
            drafts = torch.where((drafts < 0) & ~done.probability.isnan(), NOT_DRAFTED, drafts)
        return torch.cat([done.accepted[:, None], done.next_token[:, None], drafts], 1)
