"""Sequences that go through their rounds together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .graph import Graphs
from .processed import ProcessedRound
from .processors import Processors
from .request import Kind, Request
from .round import advance, speculate
from .rows import Rows


class Group:
    """Requests of one kind, for as long as they stay the same ones.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    kind : Kind
    requests : list of Request
        With their first token.
    graphs : Graphs, optional
        Records and replays the rounds; without, they are called. Rounds of processed logits always are.
    free : sequence of int
        Slots of the cache that no request has.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        kind: Kind,
        requests: list[Request],
        graphs: Graphs | None = None,
        free: Sequence[int] = (),
    ) -> None:
        self._model, self._cache = model, cache
        self.kind, self.requests = kind, requests
        self._graphs = None if kind.processed else graphs
        spare = free[: self._graphs.padding(len(requests), len(free))] if self._graphs is not None else ()
        nothing = [0] * len(spare)
        self._rows = Rows.of(
            [request.transcript.tokens[-1] for request in requests] + nothing,
            [request.transcript.position for request in requests] + nothing,
            [request.slot for request in requests] + list(spare),
            [request.seed for request in requests] + nothing,
            [request.sampling.temperature for request in requests] + [0.0] * len(spare),
            model.device,
        )
        self._processed = processed_round(model, cache, requests) if kind.processed else None

    @property
    def steps(self) -> int:
        """How many tokens the next round drafts: as many as any of the sequences has a use for.

        A graph has a number of its own, and drafts past a sequence's end change nothing.
        """
        if self._graphs is not None:
            return self.kind.steps or max(request.num_speculations for request in self.requests)
        return self.kind.steps or max(request.wanted for request in self.requests)

    @property
    def recorded(self) -> bool:
        """Whether the last round took the time of recording it."""
        return self._graphs is not None and self._graphs.recorded

    @property
    def failures(self) -> dict[int, Exception]:
        """What the requests' own processors raised, by their index."""
        return {} if self._processed is None else self._processed.failures

    @torch.inference_mode()
    def run(self, steps: int, draft_head: EarlyExitHead) -> list[list[int]]:
        """A round, and its result, as `round` gives it, on the host: the one synchronisation."""
        if self._graphs is None:
            return self._round(self._rows, steps, draft_head).tolist()
        key, count = (self.kind, steps), len(self.requests)
        held = self._held(draft_head)
        result = self._graphs.run(key, lambda rows: self._round(rows, steps, draft_head), self._rows, count, held)
        return result[:count].tolist()

    def _round(self, rows: Rows, steps: int, draft_head: EarlyExitHead) -> Tensor:
        model, cache, kind = self._model, self._cache, self.kind
        if self._processed is not None:
            if kind.speculative:
                return self._processed.speculate(rows, kind.depth, steps, draft_head, kind.min_probability)
            return self._processed.advance(rows, kind.depth)
        if kind.speculative:
            return speculate(model, cache, rows, kind.depth, steps, draft_head, kind.min_probability)
        return advance(model, cache, rows, kind.depth)

    def _held(self, draft_head: EarlyExitHead) -> list[Tensor]:
        """What a round finds at fixed addresses, beside its rows."""
        model, cache = self._model, self._cache
        heads = [(one.norm_weight, one.head_weight, one.token_map, one.scale) for one in (model.head, draft_head)]
        weights = model.decoder.layer_weights(0, model.num_layers)
        shared = (*weights, *model.decoder.rope_tables, model.embedding, cache.k, cache.v)
        return [*shared, *(tensor for head in heads for tensor in head if tensor is not None)]


def processed_round(model: LayerSkipModel, cache: SharedKVCache, requests: Sequence[Request]) -> ProcessedRound:
    """The round of requests whose logits are processed."""
    params = [request.sampling for request in requests]
    own = [request.logits_processor for request in requests]
    processors = Processors(params, own, model.vocab_size, model.device)
    histories = [request.history for request in requests if request.history is not None] if processors.look_back else []
    return ProcessedRound(model, cache, processors, histories)
