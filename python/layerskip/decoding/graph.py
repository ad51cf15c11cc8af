"""Rounds as CUDA graphs: recorded once, replayed with one launch and no Python between their kernels.

A graph has fixed addresses, so it works on rows of its own; the sequences' go in before a replay and come out after it.
It has a fixed number of rows, too: a group of sequences is padded to a power of two with rows in slots of the cache
that no sequence uses, where what they write is never read.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .rows import Rows

MOST_GRAPHS = 32  # of a cache: exits and numbers of drafts times powers of two of sequences

Round = Callable[[Rows], Tensor]


class Capture(Protocol):
    """What records a round; on a card `CudaCapture`."""

    def __call__(self, function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
        """Record what ``function`` launches: its result, which stays at one address, and what computes it anew."""


class CudaCapture:
    """Records CUDA graphs, which share one pool of memory: of all of them only one runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
        """See `Capture`. The first call compiles and tunes kernels, which a capture must not."""
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                function()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.MemPool()  # which lives on when all graphs are dropped
            # Other threads, which may stream text meanwhile, are free to use the card.
            with torch.cuda.graph(graph, pool=self._pool.id, capture_error_mode="thread_local"):
                result = function()
        return result, graph.replay


@dataclass(frozen=True)
class _Graph:
    rows: Rows
    result: Tensor
    replay: Callable[[], object]


class Graphs:
    """The recorded rounds over one cache; the least recently used one makes room for a new one.

    Parameters
    ----------
    capture : Capture
    most : int
        How many are kept.

    Attributes
    ----------
    recorded : bool
        Whether the last call recorded its round, which takes far longer than the round.
    """

    def __init__(self, capture: Capture, most: int = MOST_GRAPHS) -> None:
        self._capture, self._most = capture, most
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._held: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()
        self.recorded = False

    def __len__(self) -> int:
        """How many rounds are recorded."""
        return len(self._graphs)

    @staticmethod
    def padding(count: int, free: int) -> int:
        """How many rows to add to ``count``: up to a power of two, or none where fewer slots are ``free``."""
        missing = (1 << (count - 1).bit_length()) - count
        return missing if missing <= free else 0

    def run(self, kind: Hashable, round_: Round, rows: Rows, count: int, held: Sequence[Tensor]) -> Tensor:
        """Replay ``round_`` on ``rows``, after recording it where it is new.

        Parameters
        ----------
        kind : hashable
            All that ``round_`` depends on beside ``rows``, ``held`` and their sizes.
        round_ : callable
            Works on the rows that it is given, in place; gives [B, ...] without looking at a value on the host.
        rows : Rows
            Those from ``count`` on are padding, and go back to position 0.
        count : int
        held : sequence of Tensor
            What ``round_`` reads and writes at fixed addresses: weights, tables, cache. Where one of them has moved,
            all graphs are dropped.

        Returns
        -------
        Tensor [B, ...]
            Of all rows, valid until the next call.
        """
        self._forget_moved(held)
        key = (kind, rows.token.shape[0], rows.temperature is not None)
        self.recorded = key not in self._graphs
        if self.recorded:
            self._record(key, round_, rows)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        graph.rows.copy_(rows)
        graph.replay()
        torch._foreach_copy_([rows.token, rows.seq_lens], [graph.rows.token, graph.rows.seq_lens])
        if count < rows.token.shape[0]:
            rows.token[count:].zero_()
            rows.seq_lens[count:].zero_()
        return graph.result

    def _record(self, key: Hashable, round_: Round, rows: Rows) -> None:
        if len(self._graphs) >= self._most:
            self._graphs.popitem(last=False)
        own = rows.clone()
        self._graphs[key] = _Graph(own, *self._capture(lambda: round_(own), rows.token.device))

    def _forget_moved(self, held: Sequence[Tensor]) -> None:
        addresses = tuple(tensor.data_ptr() for tensor in held)
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
            self._held = [tensor.detach() for tensor in held]  # so that nothing else comes to lie there


def for_device(device: torch.device) -> Graphs | None:
    """Graphs where the device has them, unless LAYERSKIP_GRAPHS=0; elsewhere None, and rounds are called directly."""
    if device.type != "cuda" or os.environ.get("LAYERSKIP_GRAPHS") == "0":
        return None
    return Graphs(CudaCapture())
