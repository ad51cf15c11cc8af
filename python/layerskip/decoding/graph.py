"""Rounds as CUDA graphs: recorded once, replayed with one launch and no Python between their kernels.

A graph has fixed addresses, so it works on tensors of its own; the state of the sequences is copied into them before a
replay and out of them after it. A graph also has a fixed number of sequences. So a batch is padded to a power of two
with sequences in free slots of the cache, where nobody reads what they write.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from .round import SequenceTensors

MAX_GRAPHS = 32  # over a cache: one for each exit, number of drafts and power of two of sequences

_capturing = Lock()  # the warm-up of one thread's round would wait for the card within the recording of another's

RoundFunction = Callable[[SequenceTensors], Tensor]


class Capture(Protocol):
    """Records a round; on a card it is `CudaCapture`."""

    def __call__(self, function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
        """Record what ``function`` launches: its result, at an address that stays, and a call that computes it anew."""


class CudaCapture:
    """Records CUDA graphs. They share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
        """See `Capture`. A call before the capture compiles and tunes kernels, which is not allowed within it."""
        with _capturing, torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                function()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.MemPool()  # it outlives the graphs
            # Thread-local, so that other threads, which may stream text meanwhile, can use the card.
            with torch.cuda.graph(graph, pool=self._pool.id, capture_error_mode="thread_local"):
                result = function()
        return result, graph.replay


@dataclass(frozen=True)
class _Graph:
    sequences: SequenceTensors
    result: Tensor
    replay: Callable[[], object]


class Graphs:
    """The recorded rounds over one cache. The least recently used one is dropped for a new one.

    Parameters
    ----------
    capture : Capture
    most : int
        How many rounds are kept.

    Attributes
    ----------
    recorded : bool
        Whether the last call recorded its round, which takes far longer than the round.
    """

    def __init__(self, capture: Capture, most: int = MAX_GRAPHS) -> None:
        self._capture, self._most = capture, most
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._fixed: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()
        self.recorded = False

    def __len__(self) -> int:
        """How many rounds are recorded."""
        return len(self._graphs)

    @staticmethod
    def padding(count: int, free: int) -> int:
        """How many sequences to add to ``count`` for a power of two; 0 if fewer slots than that are ``free``."""
        missing = (1 << (count - 1).bit_length()) - count
        return missing if missing <= free else 0

    def run(
        self,
        kind: Hashable,
        round_: RoundFunction,
        sequences: SequenceTensors,
        count: int,
        fixed: Sequence[Tensor],
    ) -> Tensor:
        """Replay ``round_`` on ``sequences``; a new round is recorded first.

        Parameters
        ----------
        kind : hashable
            All that ``round_`` depends on besides ``sequences``, ``fixed`` and their sizes.
        round_ : callable
            Changes the sequences in place, and gives [B, ...]. It must not look at a value on the host.
        sequences : SequenceTensors
            Those from ``count`` on are padding, and return to position 0.
        count : int
        fixed : sequence of Tensor
            What ``round_`` reads and writes at fixed addresses: weights, tables, cache. If one of them has moved, all
            graphs are dropped.

        Returns
        -------
        Tensor [B, ...]
            The result for all sequences, valid until the next call.
        """
        self._drop_if_moved(fixed)
        key = (kind, sequences.token.shape[0], sequences.temperature is not None)
        self.recorded = key not in self._graphs
        if self.recorded:
            self._record(key, round_, sequences)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        graph.sequences.copy_(sequences)
        graph.replay()
        advanced = [graph.sequences.token, graph.sequences.seq_lens]
        torch._foreach_copy_([sequences.token, sequences.seq_lens], advanced)
        if count < sequences.token.shape[0]:
            sequences.token[count:].zero_()
            sequences.seq_lens[count:].zero_()
        return graph.result

    def _record(self, key: Hashable, round_: RoundFunction, sequences: SequenceTensors) -> None:
        if len(self._graphs) >= self._most:
            self._graphs.popitem(last=False)
        own = sequences.clone()
        self._graphs[key] = _Graph(own, *self._capture(lambda: round_(own), own.token.device))

    def _drop_if_moved(self, fixed: Sequence[Tensor]) -> None:
        addresses = tuple(tensor.data_ptr() for tensor in fixed)
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
            self._fixed = [tensor.detach() for tensor in fixed]  # keeps the memory from being reused


def for_device(device: torch.device) -> Graphs | None:
    """Graphs for a CUDA device, unless LAYERSKIP_GRAPHS=0; else None, and rounds are called directly."""
    if device.type != "cuda" or os.environ.get("LAYERSKIP_GRAPHS") == "0":
        return None
    return Graphs(CudaCapture())
