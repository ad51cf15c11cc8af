"""Devices by name, host-to-device copies, and the memory's read bandwidth."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor


def find(name: str) -> torch.device:
    """Return the device ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the first GPU, or the CPU without one.

    ValueError for a GPU that is not available, with those that are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index < count:
        return torch.device("cuda", index)
    built = "" if torch.version.cuda else ", which was built without CUDA,"
    seen = ", ".join(described(torch.device("cuda", other)) for other in range(count)) or "no GPU"
    raise ValueError(f"the device {name} is not available: torch {torch.__version__}{built} sees {seen}")


def described(device: torch.device) -> str:
    """A device, with the name of the GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


BUFFER_BYTES = 512 * 2**20  # larger than any cache


class ReadBandwidth:
    """Measure memory bandwidth by reading a buffer with all of torch's threads, of ``device`` or the CPU.

    Sample it repeatedly: on a shared machine the speed changes by the minute.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64, device=device)
        self._seconds: list[float] = []

    def sample(self) -> float:
        """Read the buffer once; return GB/s. The integer maximum is cheap, so memory alone sets the time."""
        self._wait()
        start = time.perf_counter()
        self._buffer.amax()
        self._wait()
        self._seconds.append(time.perf_counter() - start)
        return BUFFER_BYTES / self._seconds[-1] / 1e9

    def _wait(self) -> None:
        if self._buffer.is_cuda:
            torch.cuda.synchronize(self._buffer.device)

    @property
    def median(self) -> float:
        """Median of the samples, in GB/s (10^9 bytes)."""
        return BUFFER_BYTES / statistics.median(self._seconds) / 1e9


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without waiting for the copy.

    A GPU copies asynchronously only from pinned memory; torch does not reuse that before the copy is done.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
