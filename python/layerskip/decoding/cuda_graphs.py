"""Rounds as CUDA graphs: recorded once, replayed with one launch and no Python between their kernels.

A graph has fixed addresses, so the state of its sequences is in tensors of its own. It is copied there when a batch
begins, and stays there from round to round: a round reads what the one before wrote, and the host need not know it.
What a round gives goes to the host's memory behind it, and an event says when it is there. So the next round can be
launched first, and a card has no time without work.

A graph also has a fixed number of sequences. So a batch is padded to a power of two with sequences in free slots of the
cache, where nobody reads what they write.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from .spec_step import SequenceTensors

MAX_GRAPHS = 32  # over a cache: one for each exit, number of drafts and power of two of sequences

_capturing = Lock()  # the warm-up of one thread's round would wait for the card within the recording of another's

RoundFunction = Callable[[SequenceTensors], Tensor]


class Event(Protocol):
    """A place in a stream, as `torch.cuda.Event` is one."""

    def record(self, stream: Any) -> None:
        """Be the place behind all that the stream was given."""

    def wait(self, stream: Any) -> None:
        """Let a stream go on only once the place is reached."""

    def synchronize(self) -> None:
        """Return once the place is reached."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this place to another one; both were reached."""


class Card(Protocol):
    """What graphs need of a device; of a card it is `CudaCard`."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Record what ``function`` launches: its result, at an address that stays, and a call that computes it anew."""

    def host_memory(self, like: Tensor) -> Tensor:
        """Memory of the host, as large as a tensor; the host does not wait for a copy from the card to it."""

    def event(self) -> Event:
        """A new event."""

    def stream(self) -> Any:
        """The stream that launches go to now."""


class CudaCard:
    """A card. Its graphs share one pool of memory, since only one of them runs at a time.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """See `Card`. A call before the capture compiles and tunes kernels, which is not allowed within it."""
        with _capturing, torch.cuda.device(self._device):
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

    def host_memory(self, like: Tensor) -> Tensor:
        """See `Card`."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def event(self) -> Event:
        """See `Card`."""
        return torch.cuda.Event(enable_timing=True)

    def stream(self) -> Any:
        """See `Card`."""
        return torch.cuda.current_stream(self._device)


class Outcome:
    """What a round gives, on its way to the host."""

    def __init__(self, card: Card, result: Tensor) -> None:
        self._result, self._host = result, card.host_memory(result)
        self._begin, self.end = card.event(), card.event()

    def launch(self, replay: Callable[[], object], stream: Any) -> None:
        """Launch the round, and the copy of what it gives."""
        self._begin.record(stream)
        replay()
        self._host.copy_(self._result, non_blocking=True)
        self.end.record(stream)

    def read(self) -> list[list[int]]:
        """Wait for the round, and for no later one."""
        self.end.synchronize()
        rows: list[list[int]] = self._host.tolist()
        return rows

    @property
    def seconds(self) -> float:
        """How long the card took for the round, which was read."""
        return self._begin.elapsed_time(self.end) / 1e3


class _Graph:
    """A recorded round, the sequences that it works on, and two outcomes: one may be unread while the other comes."""

    def __init__(self, card: Card, round_: RoundFunction, sequences: SequenceTensors) -> None:
        self.sequences = sequences.clone()
        self._real = torch.ones_like(self.sequences.token)  # 0 of padding
        self._count = len(self._real)
        result, self._replay = card.capture(lambda: self._run(round_))
        self._outcomes = [Outcome(card, result) for _ in range(2)]

    def _run(self, round_: RoundFunction) -> Tensor:
        result, own = round_(self.sequences), self.sequences
        if len(self._real) > 1:  # padding goes back to position 0
            torch._foreach_mul_([own.token, own.seq_lens], [self._real, self._real])
        return result

    def launch(self, sequences: SequenceTensors, count: int, stream: Any) -> Outcome:
        if sequences is not self.sequences:
            self.sequences.copy_(sequences)
        if count != self._count:
            self._count = -1  # until both parts are written: an interrupt may come between
            self._real[:count], self._real[count:] = 1, 0
            self._count = count
        self._outcomes.reverse()
        self._outcomes[0].launch(self._replay, stream)
        return self._outcomes[0]


def warn_unrecorded(processor: Callable[..., Tensor]) -> None:
    """Say that the rounds of a request with a logits processor of its own are slower on a card."""
    name = getattr(processor, "__name__", type(processor).__name__)
    warnings.warn(
        f"the logits processor {name} is Python, which a CUDA graph cannot record, so its rounds are called op by op; "
        "the parameters of SamplingParams are recorded",
        stacklevel=3,
    )


class Graphs:
    """The recorded rounds over one cache. The least recently used one is dropped for a new one.

    They hold all memory that a round under way reads and writes, and wait for it before they let go of any: what is
    freed goes to whoever asks next, who may not be behind the round in its stream.

    Parameters
    ----------
    card : Card
    most : int
        How many rounds are kept.
    """

    def __init__(self, card: Card, most: int = MAX_GRAPHS) -> None:
        self._card, self._most = card, most
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._fixed: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()
        self._last: tuple[Any, Event] | None = None  # of the last launch: its stream and its end

    def __len__(self) -> int:
        """How many rounds are recorded."""
        return len(self._graphs)

    @staticmethod
    def padding(count: int, free: int) -> int:
        """How many sequences to add to ``count`` for a power of two; 0 if fewer slots than that are ``free``."""
        missing = (1 << (count - 1).bit_length()) - count
        return missing if missing <= free else 0

    def hold(self, fixed: Sequence[Tensor]) -> None:
        """Name what rounds read and write at fixed addresses: weights, tables, cache.

        If one of them has moved, all graphs are dropped. It takes tens of microseconds, so a batch does it once.
        """
        addresses = tuple(tensor.data_ptr() for tensor in fixed)
        if addresses != self._addresses:
            self.finish()
            self._graphs.clear()
            self._addresses = addresses
            self._fixed = [tensor.detach() for tensor in fixed]  # keeps the memory from being reused

    def launch(
        self, kind: Hashable, round_: RoundFunction, sequences: SequenceTensors, count: int
    ) -> tuple[Outcome, SequenceTensors]:
        """Launch ``round_`` on ``sequences``; a new round is recorded first.

        Parameters
        ----------
        kind : hashable
            All that ``round_`` depends on besides ``sequences``, what is held, and their sizes.
        round_ : callable
            Changes the sequences in place, and gives [B, ...]. It must not look at a value on the host.
        sequences : SequenceTensors
            Those from ``count`` on are padding, and return to position 0.
        count : int

        Returns
        -------
        Outcome
            To be read before the next launch but one of the same round.
        SequenceTensors
            The graph's own, which hold the sequences from now on; those that were given may be out of date. Where the
            next launch gets them, nothing is copied.
        """
        key = (kind, sequences.form)
        if key not in self._graphs:
            if len(self._graphs) >= self._most:
                self.finish()
                self._graphs.popitem(last=False)
            self._graphs[key] = _Graph(self._card, round_, sequences)
        self._graphs.move_to_end(key)
        graph, stream = self._graphs[key], self._card.stream()
        outcome = graph.launch(sequences, count, stream)
        self._last = stream, outcome.end
        return outcome, graph.sequences

    def follow(self) -> None:
        """Let what is launched from now on wait for the last round, which may have been launched in another stream."""
        if self._last is not None and self._last[0] != (stream := self._card.stream()):
            self._last[1].wait(stream)
            self._last = stream, self._last[1]

    def finish(self) -> None:
        """Wait for the last round."""
        if self._last is not None:
            self._last[1].synchronize()

    def __del__(self) -> None:
        """A session may be dropped, by an interrupt for one, with a round under way."""
        self.finish()


def for_device(device: torch.device) -> Graphs | None:
    """Graphs for a CUDA device, unless LAYERSKIP_GRAPHS=0; else None, and rounds are called directly."""
    if device.type != "cuda" or os.environ.get("LAYERSKIP_GRAPHS") == "0":
        return None
    return Graphs(CudaCard(device))
