"""A batch: the requests that go through their rounds together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .graph import Graphs
from .logits import LogitsPipeline, LogitsRound
from .request import Request, RoundKind
from .round import FusedRound, SequenceTensors


class Batch:
    """Requests of one kind of round. A batch lives until a request joins, leaves or changes its kind.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    draft_head : EarlyExitHead
    kind : RoundKind
    requests : list of Request
        Each with its first token.
    graphs : Graphs, optional
        Records and replays the rounds; without it they are called. Rounds of processed logits are always called.
    free_slots : sequence of int
        The cache rows that no request uses.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        draft_head: EarlyExitHead,
        kind: RoundKind,
        requests: list[Request],
        graphs: Graphs | None = None,
        free_slots: Sequence[int] = (),
    ) -> None:
        self._model, self._cache, self._draft_head = model, cache, draft_head
        self.kind, self.requests = kind, requests
        self._graphs = None if kind.processed else graphs
        self._round = round_of(model, cache, draft_head, requests)
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

    @property
    def num_speculations(self) -> int:
        """How many tokens the next round drafts: as many as any of the sequences can emit.

        With graphs it is what was asked for, so that fewer rounds are recorded; drafts beyond a sequence's end change
        nothing.
        """
        if self._graphs is not None:
            return self.kind.num_speculations or max(request.num_speculations for request in self.requests)
        return self.kind.num_speculations or max(request.useful_drafts for request in self.requests)

    @property
    def recorded(self) -> bool:
        """Whether the last round was recorded, which takes far longer than the round itself."""
        return self._graphs is not None and self._graphs.recorded

    @property
    def failures(self) -> dict[int, Exception]:
        """What the requests' own logits processors raised, by index."""
        return self._round.failures

    @torch.inference_mode()
    def run(self, num_speculations: int) -> list[list[int]]:
        """One round; for each request what `round` describes. Reading it is the round's only synchronisation."""
        if self._graphs is None:
            return self._run(self._sequences, num_speculations).tolist()
        result = self._graphs.run(
            (self.kind, num_speculations),
            lambda sequences: self._run(sequences, num_speculations),
            self._sequences,
            len(self.requests),
            self._tensors_at_fixed_addresses(),
        )
        return result[: len(self.requests)].tolist()

    def _run(self, sequences: SequenceTensors, num_speculations: int) -> Tensor:
        kind = self.kind
        if kind.speculative:
            return self._round.speculate(sequences, kind.exit_layer, num_speculations, kind.draft_threshold)
        return self._round.advance(sequences, kind.exit_layer)

    def _tensors_at_fixed_addresses(self) -> list[Tensor]:
        """What a recorded round reads and writes, besides the sequences: weights, tables and cache."""
        model, cache = self._model, self._cache
        heads = [(one.norm_weight, one.head_weight, one.token_map, one.scale) for one in (model.head, self._draft_head)]
        weights = model.decoder.layer_weights(0, model.num_layers)
        shared = (*weights, *model.decoder.rope_tables, model.embedding, cache.k, cache.v)
        return [*shared, *(tensor for head in heads for tensor in head if tensor is not None)]


def round_of(
    model: LayerSkipModel, cache: SharedKVCache, draft_head: EarlyExitHead, requests: Sequence[Request]
) -> FusedRound | LogitsRound:
    """The round of some requests of one kind: fused, unless their logits are processed."""
    if not requests[0].processed:
        return FusedRound(model, cache, draft_head)
    pipeline = LogitsPipeline(
        [request.sampling for request in requests],
        [request.logits_processor for request in requests],
        model.vocab_size,
        model.device,
    )
    histories = [request.sequence.history for request in requests] if pipeline.needs_history else []
    return LogitsRound(model, cache, draft_head, pipeline, [history for history in histories if history is not None])
