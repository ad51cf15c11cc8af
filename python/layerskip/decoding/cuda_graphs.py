"""CUDA graphs of rounds: captured once, replayed with one launch and no Python between their kernels.

A graph has fixed addresses, so it keeps the state of its sequences in its own tensors. The state is copied there when a
batch begins and stays there from round to round: each round reads what the last one wrote, and the host need not know
it. The result is copied to host memory behind the round, followed by an event. So the host can launch the next round
before it reads the last, and the GPU never idles.

A graph also has a fixed number of sequences. So a batch is padded to a power of two with sequences in free slots of the
KV cache, where nobody reads what they write.
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

MAX_GRAPHS = 32  # per cache: one for each exit layer, number of draft tokens and power of two of sequences

_capturing = Lock()  # otherwise one thread's warm-up would synchronize within another thread's capture

StepFunction = Callable[[SequenceTensors], Tensor]


class Device(Protocol):
    """What graphs need of a device. `CudaDevice` is the real one."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Capture what ``function`` launches: its result, at a fixed address, and a call that replays it."""

    def host_memory(self, like: Tensor) -> Tensor:
        """Host memory of a tensor's size, to which the device copies asynchronously."""

    def event(self) -> Any:
        """An event with the methods of `torch.cuda.Event`."""

    def stream(self) -> Any:
        """The current stream."""


class CudaDevice:
    """A GPU. Its graphs share one memory pool, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """Call ``function`` once to compile and tune its kernels, which capture forbids; then capture it."""
        with _capturing, torch.cuda.device(self._device):
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                function()
            torch.cuda.current_stream().wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.MemPool()  # it outlives the graphs
            # Thread-local, so that other threads can use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool.id, capture_error_mode="thread_local"):
                result = function()
        return result, graph.replay

    def host_memory(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def stream(self) -> Any:
        return torch.cuda.current_stream(self._device)


class GraphResult:
    """The result of a launched round, on its way to the host."""

    def __init__(self, device: Device, result: Tensor) -> None:
        self._result, self._host = result, device.host_memory(result)
        self._begin, self.end = device.event(), device.event()

    def launch(self, replay: Callable[[], object], stream: Any) -> None:
        self._begin.record(stream)
        replay()
        self._host.copy_(self._result, non_blocking=True)
        self.end.record(stream)

    def read(self) -> list[list[int]]:
        """Wait for this round, and for no later one."""
        self.end.synchronize()
        rows: list[list[int]] = self._host.tolist()
        return rows

    @property
    def seconds(self) -> float:
        """The GPU's time for the round, once it was read."""
        return self._begin.elapsed_time(self.end) / 1e3


class _Graph:
    """A captured round, its sequences, and two results: one may be unread while the next is computed."""

    def __init__(self, device: Device, step: StepFunction, sequences: SequenceTensors) -> None:
        self.sequences = sequences.each(Tensor.clone)
        self._real = torch.ones_like(self.sequences.token)  # 0 for padding
        self._count = len(self._real)
        result, self._replay = device.capture(lambda: self._run(step))
        self._results = [GraphResult(device, result) for _ in range(2)]

    def _run(self, step: StepFunction) -> Tensor:
        result, own = step(self.sequences), self.sequences
        if len(self._real) > 1:  # reset padding to position 0
            torch._foreach_mul_([own.token, own.seq_lens], [self._real, self._real])
        return result

    def launch(self, sequences: SequenceTensors, count: int, stream: Any) -> GraphResult:
        if sequences is not self.sequences:
            self.sequences.copy_(sequences)
        if count != self._count:
            self._count = -1  # until both parts are written: an interrupt may come between
            self._real[:count], self._real[count:] = 1, 0
            self._count = count
        self._results.reverse()
        self._results[0].launch(self._replay, stream)
        return self._results[0]


def warn_unrecorded(processor: Callable[..., Tensor]) -> None:
    """Warn that a request with its own logits processor decodes more slowly on a GPU."""
    name = getattr(processor, "__name__", type(processor).__name__)
    warnings.warn(
        f"the logits processor {name} is Python, which a CUDA graph cannot record, so its rounds are called op by op; "
        "the parameters of SamplingParams are recorded",
        stacklevel=3,
    )


class Graphs:
    """The graphs over one KV cache; the least recently used one makes room for a new one.

    They hold all memory that a running round reads and writes, and wait for it before they free any: freed memory may
    be reused at once, in another stream.
    """

    def __init__(self, device: Device, max_graphs: int = MAX_GRAPHS) -> None:
        self._device, self._max_graphs = device, max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._fixed: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()
        self._last: tuple[Any, Any] | None = None  # stream and end of the last launch

    def __len__(self) -> int:
        return len(self._graphs)

    @staticmethod
    def padding(count: int, free: int) -> int:
        """How many sequences to add to ``count`` for a power of two; 0 if fewer slots than that are ``free``."""
        missing = (1 << (count - 1).bit_length()) - count
        return missing if missing <= free else 0

    def hold(self, fixed: Sequence[Tensor]) -> None:
        """Set what rounds read and write at fixed addresses: weights, tables, KV cache.

        If one of them has moved, all graphs are dropped. It takes tens of microseconds, so a batch does it once.
        """
        addresses = tuple(tensor.data_ptr() for tensor in fixed)
        if addresses != self._addresses:
            self.finish()
            self._graphs.clear()
            self._addresses = addresses
            self._fixed = [tensor.detach() for tensor in fixed]  # keeps the memory from being reused

    def launch(
        self, kind: Hashable, step: StepFunction, sequences: SequenceTensors, count: int
    ) -> tuple[GraphResult, SequenceTensors]:
        """Launch ``step`` on ``sequences``, those from ``count`` on as padding; a new step is captured first.

        ``kind`` is all that ``step`` depends on besides the sequences, the held tensors, and their sizes. ``step``
        changes the sequences in place, gives [B, ...], and must not look at a value on the host.

        Returns
        -------
        GraphResult
            Must be read before the next launch, unless that is of the same step.
        SequenceTensors
            The graph's own, which hold the state from now on; those that were given may be out of date. If the next
            launch gets them, nothing is copied.
        """
        key = (kind, sequences.form)
        if key not in self._graphs:
            if len(self._graphs) >= self._max_graphs:
                self.finish()
                self._graphs.popitem(last=False)
            self._graphs[key] = _Graph(self._device, step, sequences)
        self._graphs.move_to_end(key)
        graph, stream = self._graphs[key], self._device.stream()
        result = graph.launch(sequences, count, stream)
        self._last = stream, result.end
        return result, graph.sequences

    def follow(self) -> None:
        """Order later launches behind the last round, which may have been launched in another stream."""
        if self._last is not None and self._last[0] != (stream := self._device.stream()):
            self._last[1].wait(stream)
            self._last = stream, self._last[1]

    def finish(self) -> None:
        """Wait for the last round."""
        if self._last is not None:
            self._last[1].synchronize()

    def __del__(self) -> None:
        # An interrupt may drop a session while a round runs.
        self.finish()


def for_device(device: torch.device) -> Graphs | None:
    """Graphs for a CUDA device, unless LAYERSKIP_GRAPHS=0; else None, and rounds are called directly."""
    if device.type != "cuda" or os.environ.get("LAYERSKIP_GRAPHS") == "0":
        return None
    return Graphs(CudaDevice(device))
