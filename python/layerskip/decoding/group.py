"""Sequences that go through their rounds together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import LayerSkipModel
from ..modules import EarlyExitHead, SharedKVCache
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
    """

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache, kind: Kind, requests: list[Request]) -> None:
        self._model, self._cache = model, cache
        self.kind, self.requests = kind, requests
        self._rows = Rows.of(
            [request.transcript.tokens[-1] for request in requests],
            [request.transcript.position for request in requests],
            [request.slot for request in requests],
            [request.seed for request in requests],
            [request.sampling.temperature for request in requests],
            model.device,
        )
        self._processed = processed_round(model, cache, requests) if kind.processed else None

    @property
    def steps(self) -> int:
        """How many tokens the next round drafts: as many as any of the sequences has a use for."""
        return self.kind.steps or max(request.wanted for request in self.requests)

    @property
    def failures(self) -> dict[int, Exception]:
        """What the requests' own processors raised, by their index."""
        return {} if self._processed is None else self._processed.failures

    @torch.inference_mode()
    def run(self, steps: int, draft_head: EarlyExitHead) -> list[list[int]]:
        """A round, and its result, as `round` gives it, on the host: the one synchronisation."""
        return self._run(steps, draft_head).tolist()

    def _run(self, steps: int, draft_head: EarlyExitHead) -> Tensor:
        model, cache, rows, kind = self._model, self._cache, self._rows, self.kind
        if self._processed is not None:
            if kind.speculative:
                return self._processed.speculate(rows, kind.depth, steps, draft_head, kind.min_probability)
            return self._processed.advance(rows, kind.depth)
        if kind.speculative:
            return speculate(model, cache, rows, kind.depth, steps, draft_head, kind.min_probability)
        return advance(model, cache, rows, kind.depth)


def processed_round(model: LayerSkipModel, cache: SharedKVCache, requests: Sequence[Request]) -> ProcessedRound:
    """The round of requests whose logits are processed."""
    params = [request.sampling for request in requests]
    own = [request.logits_processor for request in requests]
    processors = Processors(params, own, model.vocab_size, model.device)
    histories = [request.history for request in requests if request.history is not None] if processors.look_back else []
    return ProcessedRound(model, cache, processors, histories)
