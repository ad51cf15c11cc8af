"""A round's work on the device: on fixed tensors, and no value comes to the host.

Every round gives one tensor [B, 2 + K] int64, which is all that the host reads afterwards: how many drafts it accepted,
the token that follows them, the K drafts. A token is -1 where logits are not finite; a draft is `NOT_DRAFTED` where
none was made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import Noise, accept_greedy, accept_sampled

from ..models import LayerSkipModel, SharedKVCache
from .controls import LogitsControls
from .sending import sent

NOT_DRAFTED = -2


class Drafted(NamedTuple):
    """Drafts, whoever made them, as verification takes them.

    ``tokens`` [B, K] are `NOT_DRAFTED` from where a sequence has none. ``states`` [B, K + 1, D] are those of the last
    token and the drafts after the layer from which they are verified. Where tokens are drawn, the drafts are drawn from
    ``logits`` [B, K, S] over the tokens ``token_map`` [S], or over the vocabulary.
    """

    tokens: Tensor
    states: Tensor
    logits: Tensor | None
    token_map: Tensor | None


class LookedUp(NamedTuple):
    """Drafts that were looked up, ``tokens`` [B, K].

    Where tokens are drawn, ``token_map`` [S] holds each of them once.
    """

    tokens: Tensor
    token_map: Tensor | None

    @classmethod
    def of(
        cls, drafts: Sequence[Sequence[int]], most: int, vocab_size: int, device: torch.device, draws: bool
    ) -> LookedUp:
        """The tensors of what the host knows; their sizes depend only on B and K, which is ``most``.

        They go to the device in copies for which the host does not wait.
        """
        padded = [[*draft, *[NOT_DRAFTED] * (most - len(draft))] for draft in drafts]
        tokens = sent(torch.tensor(padded, dtype=torch.int64), device)
        if not draws:
            return cls(tokens, None)
        known = {token for draft in drafts for token in draft}
        size = min(max(1, len(drafts) * most), vocab_size)
        others = (token for token in range(vocab_size) if token not in known)
        return cls(tokens, sent(torch.tensor([*known, *islice(others, size - len(known))]), device))

    @property
    def logits(self) -> Tensor:
        """[B, K, S]: each draft was certain to be what it is."""
        certain = (self.tokens[:, :, None] == self.token_map) | (self.tokens < 0)[:, :, None]
        return torch.where(certain, 0.0, -torch.inf)


@dataclass(frozen=True)
class SequenceTensors:
    """The state of the sequences of a round: entry b of every tensor belongs to sequence b.

    A round rewrites the first two tensors in place, and the tokens that the controls have seen.

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
    looked_up : LookedUp or None
        The drafts of the next round, where no exit makes them.
    controls : LogitsControls or None
        How logits are processed, where they are.
    """

    token: Tensor
    seq_lens: Tensor
    slots: Tensor
    seed: Tensor
    temperature: Tensor | None = None
    looked_up: LookedUp | None = None
    controls: LogitsControls | None = None

    @property
    def noise(self) -> Noise | None:
        """Temperature and seed as the kernels take them, or None where every sequence is greedy."""
        return None if self.temperature is None else Noise(self.temperature, self.seed)

    @property
    def draws(self) -> bool:
        """Whether tokens may be drawn, or chosen from processed logits as drawn ones are."""
        return self.temperature is not None or self.controls is not None

    @property
    def form(self) -> Hashable:
        """What a round depends on besides values."""
        controls = None if self.controls is None else self.controls.form
        return self.token.shape[0], self.temperature is not None, controls

    def clone(self) -> SequenceTensors:
        """The same values in new tensors."""
        looked_up = self.looked_up
        if looked_up is not None:
            token_map = None if looked_up.token_map is None else looked_up.token_map.clone()
            looked_up = LookedUp(looked_up.tokens.clone(), token_map)
        return self._each(Tensor.clone, looked_up)

    def rows(self, index: Tensor) -> SequenceTensors:
        """Some of the sequences, in new tensors."""
        looked_up = self.looked_up
        if looked_up is not None:
            looked_up = looked_up._replace(tokens=looked_up.tokens[index])
        return self._each(lambda tensor: tensor[index], looked_up)

    def _each(self, change: Callable[[Tensor], Tensor], looked_up: LookedUp | None) -> SequenceTensors:
        temperature = None if self.temperature is None else change(self.temperature)
        controls = None if self.controls is None else self.controls.each(change)
        token, seq_lens, slots, seed = map(change, (self.token, self.seq_lens, self.slots, self.seed))
        return SequenceTensors(token, seq_lens, slots, seed, temperature, looked_up, controls)

    def go_on(self, token: Tensor) -> None:
        """Let these tokens be the last ones.

        One of logits that are not finite is -1, and ends its sequence; but the host may not have read that when the
        next round begins, and the embedding has no such token. So it goes on with token 0, to no effect.
        """
        torch.clamp(token, min=0, out=self.token)

    def copy_(self, other: SequenceTensors) -> None:
        """Take the values of ``other``, which has the same form; nothing is done for a tensor that both share."""
        whole, others = [], []
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            if mine is theirs:
                continue
            if mine.dtype == torch.int64:
                whole.append(mine)
                others.append(theirs)
            else:
                mine.copy_(theirs)
        if whole:
            torch._foreach_copy_(whole, others)  # one launch

    def _tensors(self) -> list[Tensor]:
        temperature = () if self.temperature is None else (self.temperature,)
        controls = () if self.controls is None else self.controls.tensors
        looked_up = [tensor for tensor in self.looked_up or () if tensor is not None]
        return [self.token, self.seq_lens, self.slots, self.seed, *temperature, *looked_up, *controls]

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
        token, lengths, cache_rows, seed = sent(torch.tensor([tokens, seq_lens, slots, seeds]), device).unbind()
        drawn = any(temperatures)
        temperature = sent(torch.tensor(temperatures, dtype=torch.float32), device) if drawn else None
        return cls(token, lengths, cache_rows, seed, temperature)


class FusedRound:
    """Rounds in which one fused call drafts, verifies and chooses the tokens, and no logits are written.

    `LogitsRound` has the same methods, for sequences whose logits are processed.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
        With room for K + 1 more positions of every sequence.
    """

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache) -> None:
        self._model, self._cache = model, cache

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
        token = self._model.decode(
            sequences.token,
            self._cache,
            exit_layer,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
        )
        sequences.go_on(token)
        sequences.seq_lens.add_(1)
        return F.pad(token[:, None], (1, 0))

    def speculate(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Tensor:
        """Draft with layers [0, E) and blocks, verify with layers [E, L), accept (Elhoushi et al. 2024, section 4.3).

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
            draft_threshold=draft_threshold,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
        )
        sequences.go_on(done.next_token)
        drafts = _made(done.tokens, done.probability, draft_threshold)
        return torch.column_stack([done.accepted, done.next_token, drafts])

    def verify(self, sequences: SequenceTensors) -> Tensor:
        """Verify what was looked up, through all layers in one pass, and accept.

        A looked-up draft is drawn from a distribution of one token. So where tokens are drawn, it is accepted with the
        probability p that the model gives it, and else a token is drawn from p without it (Leviathan et al. 2023).

        Parameters
        ----------
        sequences : SequenceTensors
            With `LookedUp` drafts. Advanced to the last token of what was accepted.

        Returns
        -------
        Tensor [B, 2 + K], int64
        """
        drafted = self.look_up(sequences)
        return self.accept(drafted, drafted.states, sequences)

    def draft(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Drafted:
        """The first half of `speculate`: drafts, and states after layer E."""
        head, logits = self._model.draft_head, None
        if sequences.noise is not None:
            size = (sequences.token.shape[0], num_speculations, head.num_rows)
            logits = torch.empty(size, dtype=torch.float32, device=sequences.token.device)
        made = self._model.draft(
            sequences.token,
            self._cache,
            exit_layer,
            num_speculations,
            draft_threshold=draft_threshold,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
            logits=logits,
        )
        return Drafted(_made(made.tokens, made.probability, draft_threshold), made.states, logits, head.token_map)

    def look_up(self, sequences: SequenceTensors, end: int | None = None) -> Drafted:
        """The looked-up drafts, and their states after layers [0, end)."""
        return looked_up_states(self._model, self._cache, sequences, end)

    def accept(self, drafted: Drafted, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """Accept drafts by the states ``hidden`` [B, K + 1, D] after the last layer; the result is a round's."""
        model, noise = self._model, sequences.noise
        if noise is None:
            target = model.head(hidden.flatten(0, 1)).token.view(hidden.shape[:2])
            accepted, token = accept_greedy(drafted.tokens, target, sequences.seq_lens)
        else:
            assert drafted.logits is not None
            logits = hidden.new_empty((*hidden.shape[:2], model.vocab_size), dtype=torch.float32)
            model.head(hidden, logits=logits.view(-1, model.vocab_size))
            accepted, token = accept_sampled(
                drafted.tokens, drafted.logits, logits, sequences.seq_lens, *noise, drafted.token_map
            )
        sequences.go_on(token)
        return torch.column_stack([accepted, token, drafted.tokens])


def _made(tokens: Tensor, probability: Tensor, draft_threshold: float) -> Tensor:
    """The drafts of an op, which gives -1 for those that were not made: they have a probability.

    One of logits that are not finite has NaN, and stays -1.
    """
    return torch.where((tokens < 0) & ~probability.isnan(), NOT_DRAFTED, tokens) if draft_threshold else tokens


def looked_up_states(
    model: LayerSkipModel, cache: SharedKVCache, sequences: SequenceTensors, end: int | None
) -> Drafted:
    """The looked-up drafts of some sequences, and their states after layers [0, end), or all layers."""
    assert sequences.looked_up is not None
    tokens, token_map = sequences.looked_up
    rows = torch.column_stack([sequences.token, tokens]).clamp_min(0)  # a draft that is missing is any token
    states = model.read(rows, cache, end, seq_lens=sequences.seq_lens, slots=sequences.slots)
    return Drafted(tokens, states, sequences.looked_up.logits if sequences.draws else None, token_map)
