"""Batch: requests that go through their rounds together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from .._autograd_modes import InferenceMode
from ..models import LayerSkipModel, SharedKVCache
from .cuda_graphs import GraphResult, Graphs
from .request import Clock, DraftKind, Request, RoundKind
from .sampling import LogitsControls, LogitsPipeline, SamplingParams
from .scheduler import catch_up_draft_layers
from .spec_step import LookupDrafts, SequenceTensors, SpecStep

LOOKUP_MULTIPLE = 4  # recorded rounds have a multiple of this many lookup drafts: rows cost less than recordings


class CalledRound(NamedTuple):
    """A round that was called, not recorded; the methods are those of `GraphResult`."""

    result: Tensor
    started: float
    clock: Clock

    def read(self) -> list[list[int]]:
        rows: list[list[int]] = self.result.tolist()
        return rows

    @property
    def seconds(self) -> float:
        return self.clock() - self.started  # until now, so right after `read`


class Launched(NamedTuple):
    """A round on its way."""

    draft_kind: DraftKind
    num_speculations: int
    outcome: CalledRound | GraphResult
    caught_up: bool  # whether draft layers had to catch up before it, so that it took longer


class Batch:
    """Requests of one kind of round. A batch lives until a request joins, leaves or changes its kind.

    ``requests`` have their first tokens. ``graphs`` records and replays the rounds, padded with ``free_slots`` of the
    cache. Rounds of mixed draft sources, and those with a logits processor of a request's own, which is Python, are
    always called.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        kind: RoundKind,
        requests: list[Request],
        graphs: Graphs | None = None,
        free_slots: Sequence[int] = (),
        clock: Clock = time.perf_counter,
    ) -> None:
        self._model, self._cache, self._clock = model, cache, clock
        self.kind, self.requests = kind, requests
        self._graphs = None if any(request.logits_processor is not None for request in requests) else graphs
        self._step = spec_step_of(model, cache, requests, recorded=self._graphs is not None)
        self._launched: deque[Launched] = deque()  # and not read
        padding: Sequence[int] = ()
        if self._graphs is not None:
            padding = free_slots[: self._graphs.padding(len(requests), len(free_slots))]
            self._graphs.hold(self._tensors_at_fixed_addresses())
        self._sequences = sequences_of(model, requests, padding)

    @property
    def num_speculations(self) -> int:
        """K of the next round: as many drafts as any of its sequences can emit.

        With graphs it is the K asked for, or the longest lookup rounded up, so that fewer rounds are recorded; drafts
        beyond a sequence's end change nothing.
        """
        drafting = [request for request in self.requests if request.lookup_drafts is None]
        if not drafting:
            longest = max(len(request.lookup_drafts or ()) for request in self.requests)
            room = self._cache.capacity - 1 - self._last_position
            return (
                longest
                if self._graphs is None
                else max(longest, min(-(-longest // LOOKUP_MULTIPLE) * LOOKUP_MULTIPLE, room))
            )
        if self._graphs is not None:
            return self.kind.num_speculations or max(request.num_speculations for request in drafting)
        return self.kind.num_speculations or max(request.useful_drafts for request in drafting)

    @property
    def draft_kind(self) -> DraftKind:
        """Origin of the drafts of the next round."""
        lookups = [request.lookup_drafts is not None for request in self.requests]
        if any(lookups):
            return DraftKind.LOOKUP if all(lookups) else DraftKind.MIXED
        return DraftKind.EXIT

    @property
    def _last_position(self) -> int:
        return max(request.position for request in self.requests)

    @property
    def under_way(self) -> bool:
        """Whether a launched round was not read."""
        return bool(self._launched)

    @property
    def runs_ahead(self) -> bool:
        """Whether another round may be launched before the last one is read.

        Its tokens are on the GPU. If a sequence turns out to have ended, the round wrote behind its end, where nobody
        reads. But it must not write behind the end of the cache, drafts must not depend on what the host reads first,
        and some sequence must need another token.
        """
        if self._graphs is None or any(request.lookup is not None for request in self.requests):
            return False
        if self._has_draft_layers and self._launched[-1].num_speculations == 0:
            return False  # draft layers have not read the tokens of that round
        positions = self._launched[-1].num_speculations + 1 + self.num_speculations + 1
        fits = self._last_position + positions <= self._cache.capacity
        return fits and any(request.remaining > 1 for request in self.requests)

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the requests' own logits processors, by index."""
        return self._step.failures

    def run(self) -> tuple[Launched, list[list[int]]]:
        """Run a round and return it with its results; launch the next one before reading, if possible."""
        with InferenceMode(True):
            if not self._launched:
                self.launch()
            if self.runs_ahead:
                self.launch()
        return self.read()

    def launch(self) -> None:
        """Launch a recorded round, or call it."""
        started, sequences = self._clock(), self._sequences
        for request in self.requests:
            if request.history is not None:
                request.history.extend(request.new_tokens)
        draft_kind, num_speculations = self.draft_kind, self.num_speculations
        caught_up = self._catch_up(num_speculations)
        looks_up = draft_kind is DraftKind.LOOKUP and (num_speculations or sequences.draws)
        if looks_up or draft_kind is DraftKind.MIXED:
            drafts = [request.lookup_drafts or () for request in self.requests]
            drafts += [()] * (sequences.token.shape[0] - len(drafts))  # of the padding
            longest = num_speculations if looks_up else max(map(len, drafts))
            lookup = LookupDrafts.of(drafts, longest, self._model.vocab_size, self._model.device, sequences.draws)
            sequences = replace(sequences, lookup=lookup)
        outcome: CalledRound | GraphResult
        if self._graphs is None or draft_kind is DraftKind.MIXED:
            outcome = CalledRound(self._run(sequences, draft_kind, num_speculations), started, self._clock)
        else:
            outcome, sequences = self._graphs.launch(
                (self.kind, draft_kind, num_speculations),
                lambda recorded: self._run(recorded, draft_kind, num_speculations),
                sequences,
                len(self.requests),
            )
            self._sequences = sequences if sequences.lookup is None else replace(sequences, lookup=None)
        self._launched.append(Launched(draft_kind, num_speculations, outcome, caught_up))

    def read(self) -> tuple[Launched, list[list[int]]]:
        """Wait for the oldest launched round: the only synchronization of a round."""
        launched = self._launched.popleft()
        results = launched.outcome.read()[: len(self.requests)]
        if self._has_draft_layers and launched.num_speculations:
            for request, (accepted, *_) in zip(self.requests, results, strict=True):
                if request.lookup_drafts is None:  # rejected drafts are read again
                    request.num_draft_cached = request.position + accepted + 1
        return launched, results

    @property
    def _has_draft_layers(self) -> bool:
        return self.kind.speculative and self._model.decoder.num_draft_layers > 0

    def _catch_up(self, num_speculations: int) -> bool:
        """Run draft layers on tokens that they have not read; whether there were any. There are none after a round."""
        if not (self._has_draft_layers and num_speculations) or self._launched:
            return False
        late = [request for request in self.requests if request.lookup_drafts is None and request.draft_lag]
        for request in late:
            catch_up_draft_layers(self._model, self._cache, request, request.position)
        return bool(late)

    def _run(self, sequences: SequenceTensors, draft_kind: DraftKind, num_speculations: int) -> Tensor:
        kind, step = self.kind, self._step
        # Without drafts, draft layers read nothing.
        no_drafts = num_speculations == kind.num_speculations == 0 and sequences.lookup is None
        if no_drafts or not kind.speculative:
            return step.advance(sequences, kind.num_layers)
        lookup_rows = None
        if draft_kind is DraftKind.MIXED:
            lookup_rows = [row for row, request in enumerate(self.requests) if request.lookup_drafts is not None]
        return step.speculate(sequences, kind.exit_layer, num_speculations, kind.draft_threshold, lookup_rows)

    def _tensors_at_fixed_addresses(self) -> list[Tensor]:
        """Weights, tables and cache, which a recorded round reads and writes."""
        model, cache = self._model, self._cache
        heads = [(one.norm_weight, one.head_weight, one.token_map, one.scale) for one in (model.head, model.draft_head)]
        weights = model.decoder.layer_weights(0, model.num_layers + model.decoder.num_draft_layers)
        shared = (*weights, *model.decoder.rope_tables, model.embedding, cache.k, cache.v)
        return [*shared, *(tensor for head in heads for tensor in head if tensor is not None)]


def sequences_of(model: LayerSkipModel, requests: Sequence[Request], padding: Sequence[int] = ()) -> SequenceTensors:
    """Return the tensors of requests of one kind, and of padding in free slots."""
    zeros = [0] * len(padding)
    sequences = SequenceTensors.of(
        [(request.new_tokens or [0])[-1] for request in requests] + zeros,
        [request.position for request in requests] + zeros,
        [request.slot for request in requests] + list(padding),
        [request.seed for request in requests] + zeros,
        [request.sampling.temperature for request in requests] + [0.0] * len(padding),
        model.device,
    )
    if not requests[0].processed:
        return sequences
    params = [request.sampling for request in requests] + [SamplingParams()] * len(padding)
    before = [request.all_ids[0] for request in requests] + [sequences.token[:0]] * len(padding)
    return replace(sequences, controls=LogitsControls.of(params, before, model.vocab_size, model.device))


def spec_step_of(
    model: LayerSkipModel, cache: SharedKVCache, requests: Sequence[Request], recorded: bool = False
) -> SpecStep:
    """Return the step of requests of one kind. A recorded one must not read values on the host."""
    processors = [request.logits_processor for request in requests]
    pipeline = LogitsPipeline(processors, [request.history for request in requests])
    return SpecStep(model, cache, pipeline, may_sync=not recorded and model.device.type == "cpu")
