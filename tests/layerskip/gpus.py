"""A fake GPU: launched work waits in a queue, as in a stream, until the host waits for it.

It replaces `CudaDevice`. A replay calls the captured function again, on the tensors of the capture; all code around it
is the code that runs on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip.decoding.cuda_graphs import Graphs

aten = torch.ops.aten
MEETS_THE_HOST = {
    aten._local_scalar_dense.default: "looks at a value",
    aten.item.default: "looks at a value",  # in inference mode it comes as it was called
    aten.is_nonzero.default: "looks at a value",
    aten.nonzero.default: "has a shape that depends on values",
    aten.masked_select.default: "has a shape that depends on values",
    aten.lift_fresh.default: "copies from the host",
}


class NoLook(TorchDispatchMode):
    """Fails where a value goes to the host or comes from it: in a capture an error, in a round a wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in MEETS_THE_HOST, f"a round {MEETS_THE_HOST.get(func)}"
        if func in (aten.index.Tensor, aten.index_put_.default):
            assert all(one is None or one.dtype == torch.int64 for one in args[1]), "a round looks at a mask"
        return func(*args, **(kwargs or {}))


class InOrder(TorchDispatchMode):
    """Other work on the GPU comes behind what waits in its queue."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.gpu.drain()
        return func(*args, **(kwargs or {}))


class FakeEvent:
    """Stands in for `torch.cuda.Event`. A round takes a second."""

    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu, self._reached, self._at = gpu, True, 0.0
        self.waits: list[str] = []

    def record(self, stream: str) -> None:
        self._reached = False

        def reach() -> None:
            self._reached, self._at = True, self.gpu.seconds

        self.gpu.put(reach)

    def wait(self, stream: str) -> None:
        self.waits.append(stream)

    def synchronize(self) -> None:
        self.gpu.drain(lambda: self._reached)

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self._reached
        assert end_event._reached
        return 1e3 * (end_event._at - self._at)


class HostMemory:
    """Memory that a copy goes to: before it is there, nothing that could be taken for a result."""

    VOID = -99

    def __init__(self, gpu: FakeGPU, like: Tensor) -> None:
        self.gpu, self._rows = gpu, [[self.VOID] * like.shape[1]] * like.shape[0]

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self._rows = [[self.VOID] * source.shape[1]] * source.shape[0]
        self.gpu.put(lambda: setattr(self, "_rows", source.tolist()))

    def tolist(self) -> list[list[int]]:
        return self._rows


class FakeGPU:
    """Stands in for `CudaDevice`.

    ``lazy``: it does what is launched only when the host waits for it, or gives it other work; else at once.
    """

    def __init__(self, lazy: bool = True) -> None:
        self.lazy, self.seconds = lazy, 0.0
        self.captures = self.replays = self.most_unread = 0
        self.current = "a stream"
        self.events: list[FakeEvent] = []
        self._queue: deque[Callable[[], Any]] = deque()
        self.busy = False
        self._waiting = 0  # replays in the queue

    def capture(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        result = function().clone()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            self._waiting += 1
            self.most_unread = max(self.most_unread, self._waiting)
            self.put(play)

        def play() -> None:
            self._waiting -= 1
            self.seconds += 1.0
            with torch.inference_mode(), NoLook():
                result.copy_(function())

        return result, replay

    def host_memory(self, like: Tensor) -> Any:
        return HostMemory(self, like)

    def event(self) -> FakeEvent:
        self.events.append(FakeEvent(self))
        return self.events[-1]

    def stream(self) -> str:
        return self.current

    def put(self, work: Callable[[], Any]) -> None:
        self._queue.append(work)
        if not self.lazy:
            self.drain()

    def drain(self, until: Callable[[], bool] = lambda: False) -> None:
        """Do what waits, in order."""
        if self.busy:
            return
        self.busy = True
        try:
            while self._queue and not until():
                self._queue.popleft()()
        finally:
            self.busy = False


def graphs_on(gpu: FakeGPU) -> Graphs:
    """Graphs that are captured on a fake GPU."""
    return Graphs(gpu)
