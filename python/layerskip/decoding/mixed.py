"""A round with drafts from two sources: an exit makes those of some sequences, those of others were looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import LayerSkipModel, SharedKVCache
from .logits import LogitsRound
from .round import NOT_DRAFTED, FusedRound, SequenceTensors
from .sending import sent


class MixedRound:
    """Both kinds of drafts meet after layer E, and the layers after it are read once for all.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    drafting, looking_up : (FusedRound or LogitsRound, sequence of int)
        The round of the sequences for which an exit drafts, and which they are; the same of the others.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        drafting: tuple[FusedRound | LogitsRound, Sequence[int]],
        looking_up: tuple[FusedRound | LogitsRound, Sequence[int]],
    ) -> None:
        self._model, self._cache = model, cache
        (self._drafting, drafts), (self._looking_up, looks_up) = drafting, looking_up
        self._rows = [sent(torch.tensor(rows), model.device) for rows in (drafts, looks_up)]
        self._numbers = (drafts, looks_up)

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index."""
        rounds = zip((self._drafting, self._looking_up), self._numbers, strict=True)
        return {rows[index]: error for round_, rows in rounds for index, error in round_.failures.items()}

    def speculate(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float
    ) -> Tensor:
        """As `FusedRound.speculate`; the sequences' `LookedUp` drafts are those of the others.

        Returns
        -------
        Tensor [B, 2 + K], int64
            K is the larger of ``num_speculations`` and what was looked up.
        """
        own = [sequences.rows(rows) for rows in self._rows]
        parts = [
            self._drafting.draft(own[0], exit_layer, num_speculations, draft_threshold),
            self._looking_up.look_up(own[1], exit_layer),
        ]
        most, batch = max(part.tokens.shape[1] for part in parts), sequences.token.shape[0]
        states = parts[0].states.new_zeros(batch, most + 1, parts[0].states.shape[2])
        for rows, part in zip(self._rows, parts, strict=True):
            states[rows, : part.states.shape[1]] = part.states
        hidden = self._model.decoder.forward(
            states, self._cache, exit_layer, self._model.num_layers, sequences.seq_lens, sequences.slots
        )
        result = sequences.token.new_full((batch, 2 + most), NOT_DRAFTED)
        rounds = (self._drafting, self._looking_up)
        for round_, rows, part, some in zip(rounds, self._rows, parts, own, strict=True):
            accepted = round_.accept(part, hidden[rows, : part.states.shape[1]], some)
            result[rows, : accepted.shape[1]] = accepted
            sequences.token[rows], sequences.seq_lens[rows] = some.token, some.seq_lens
            if sequences.controls is not None and some.controls is not None:
                sequences.controls.put_seen(rows, some.controls)
        return result
