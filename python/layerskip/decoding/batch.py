"""A batch: the requests that go through their rounds together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..models import LayerSkipModel, SharedKVCache
from .graph import Graphs
from .logits import LogitsPipeline, LogitsRound
from .mixed import MixedRound
from .reading import read_blocks
from .request import Request, RoundKind
from .round import FusedRound, LookedUp, SequenceTensors


class Batch:
    """Requests of one kind of round. A batch lives until a request joins, leaves or changes its kind.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    kind : RoundKind
    requests : list of Request
        Each with its first token.
    graphs : Graphs, optional
        Records and replays the rounds; without it they are called. Rounds of processed logits are always called, and
        so are those whose drafts have more than one source.
    free_slots : sequence of int
        The cache rows that no request uses.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        kind: RoundKind,
        requests: list[Request],
        graphs: Graphs | None = None,
        free_slots: Sequence[int] = (),
    ) -> None:
        self._model, self._cache = model, cache
        self.kind, self.requests = kind, requests
        self._graphs = None if kind.processed else graphs
        self._round = self._round_of(requests)
        self._mixed: MixedRound | None = None
        self._caught_up = False  # whether an exit's blocks had tokens to read before the last round
        self._looking_up: list[int] = []  # the requests that do in the mixed round
        padding: Sequence[int] = ()
        if self._graphs is not None:
            padding = free_slots[: self._graphs.padding(len(requests), len(free_slots))]
        zeros = [0] * len(padding)
        self._sequences = SequenceTensors.of(
            [request.sequence.tokens[-1] for request in requests] + zeros,
            [request.sequence.position for request in requests] + zeros,
            [request.slot for request in requests] + list(padding),
            [request.seed for request in requests] + zeros,
            [request.sampling.temperature for request in requests] + [0.0] * len(padding),
            model.device,
        )

    def _round_of(self, requests: Sequence[Request]) -> FusedRound | LogitsRound:
        return round_of(self._model, self._cache, requests)

    @property
    def num_speculations(self) -> int:
        """How many tokens an exit drafts in the next round: as many as any of its sequences can emit.

        With graphs it is what was asked for, so that fewer rounds are recorded; drafts beyond a sequence's end change
        nothing. Where all drafts were looked up it is the number of the longest.
        """
        drafting = [request for request in self.requests if request.looked_up is None]
        if not drafting:
            return max(len(request.looked_up or ()) for request in self.requests)
        if self._graphs is not None:
            return self.kind.num_speculations or max(request.num_speculations for request in drafting)
        return self.kind.num_speculations or max(request.useful_drafts for request in drafting)

    @property
    def exit_layer(self) -> int | None:
        """The layer that drafts in the next round: 0 where all drafts were looked up, None where only some were."""
        looked_up = [request.looked_up is not None for request in self.requests]
        if any(looked_up):
            return 0 if all(looked_up) else None
        return self.kind.exit_layer

    @property
    def recorded(self) -> bool:
        """Whether the last round took longer than such rounds do: it was recorded, or an exit's blocks caught up."""
        return self._caught_up or (self._graphs is not None and self._graphs.recorded)

    @property
    def failures(self) -> dict[int, Exception]:
        """What the requests' own logits processors raised, by index."""
        return self._round.failures if self._mixed is None else self._round.failures | self._mixed.failures

    @torch.inference_mode()
    def run(self, num_speculations: int) -> list[list[int]]:
        """One round; for each request what `round` describes. Reading it is the round's only synchronisation."""
        exit_layer, sequences = self.exit_layer, self._sequences
        self._let_blocks_follow(num_speculations)
        if not exit_layer:
            drafts = [request.looked_up or () for request in self.requests]
            drafts += [()] * (sequences.token.shape[0] - len(drafts))  # of the padding
            looked_up = LookedUp.of(drafts, self._model.vocab_size, self._model.device)
            sequences = replace(sequences, looked_up=looked_up)
        if self._graphs is None or exit_layer is None:
            return self._run(sequences, exit_layer, num_speculations).tolist()[: len(self.requests)]
        result = self._graphs.run(
            (self.kind, exit_layer, num_speculations),
            lambda recorded: self._run(recorded, exit_layer, num_speculations),
            sequences,
            len(self.requests),
            self._tensors_at_fixed_addresses(),
        )
        return result[: len(self.requests)].tolist()

    def _let_blocks_follow(self, num_speculations: int) -> None:
        """Let the exit's blocks read what has come since it drafted last, for the requests for which it drafts now."""
        self._caught_up = False
        if not (self.kind.speculative and self._model.decoder.num_blocks):
            return
        for request in self.requests:
            position = request.sequence.position
            request.blocks_done = min(request.blocks_done, position)  # rejected drafts do not count
            if request.looked_up is None and num_speculations:
                if request.blocks_done < position:
                    tokens, done = request.all_tokens, request.blocks_done
                    read_blocks(self._model, self._cache, request.slot, tokens, done, position)
                    self._caught_up = True
                request.blocks_done = position + num_speculations + 1

    def _mix(self) -> MixedRound:
        """The round of this mixture of sources; that of the last round, if it was the same."""
        looking_up = [number for number, request in enumerate(self.requests) if request.looked_up is not None]
        if self._mixed is None or looking_up != self._looking_up:
            drafting = [number for number in range(len(self.requests)) if number not in looking_up]
            drafts, looks_up = (
                (self._round_of([self.requests[row] for row in rows]), rows) for rows in (drafting, looking_up)
            )
            self._mixed, self._looking_up = MixedRound(self._model, self._cache, drafts, looks_up), looking_up
        return self._mixed

    def _run(self, sequences: SequenceTensors, exit_layer: int | None, num_speculations: int) -> Tensor:
        kind = self.kind
        if not kind.speculative:
            return self._round.advance(sequences, kind.exit_layer)
        if exit_layer and num_speculations == 0 and not kind.num_speculations:  # nobody drafts, so blocks can wait
            return self._round.advance(sequences, self._model.num_layers)
        if exit_layer == 0:
            return self._round.verify(sequences)
        round_ = self._round if exit_layer is not None else self._mix()
        return round_.speculate(sequences, kind.exit_layer, num_speculations, kind.draft_threshold)

    def _tensors_at_fixed_addresses(self) -> list[Tensor]:
        """What a recorded round reads and writes, besides the sequences: weights, tables and cache."""
        model, cache = self._model, self._cache
        heads = [(one.norm_weight, one.head_weight, one.token_map, one.scale) for one in (model.head, model.draft_head)]
        weights = model.decoder.layer_weights(0, model.num_layers + model.decoder.num_blocks)
        shared = (*weights, *model.decoder.rope_tables, model.embedding, cache.k, cache.v)
        return [*shared, *(tensor for head in heads for tensor in head if tensor is not None)]


def round_of(model: LayerSkipModel, cache: SharedKVCache, requests: Sequence[Request]) -> FusedRound | LogitsRound:
    """The round of some requests of one kind: fused, unless their logits are processed."""
    if not requests[0].processed:
        return FusedRound(model, cache)
    pipeline = LogitsPipeline(
        [request.sampling for request in requests],
        [request.logits_processor for request in requests],
        model.vocab_size,
        model.device,
    )
    histories = [request.sequence.history for request in requests] if pipeline.needs_history else []
    return LogitsRound(model, cache, pipeline, [history for history in histories if history is not None])
