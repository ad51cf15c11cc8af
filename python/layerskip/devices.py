"""Devices by name, host-to-device copies, and the memory's read bandwidth."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor


def find(name: str) -> torch.device:
    """The device for ``cpu``, ``cuda``, ``cuda:N`` or ``auto``, which is the first GPU, or the CPU without one.

    Raises
    ------
    ValueError
        For a GPU that is not available, listing those that are.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index < gpus:
        return torch.device("cuda", index)
    built = "" if torch.version.cuda else ", which was built without CUDA,"
    seen = ", ".join(described(torch.device("cuda", other)) for other in range(gpus)) or "no GPU"
    raise ValueError(f"the device {name} is not available: torch {torch.__version__}{built} sees {seen}")


def described(device: torch.device) -> str:
    """A device, with the name of its GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


BUFFER_BYTES = 512 * 2**20  # larger than any cache


class ReadBandwidth:
    """Reads a buffer with all of torch's threads, now and then: on a shared machine the speed changes by the minute.

    Parameters
    ----------
    device : torch.device, optional
        Whose memory; by default the CPU's.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64, device=device)
        self._seconds: list[float] = []

    def sample(self) -> float:
        """One pass, in GB/s. An integer maximum costs next to nothing an element, so the memory alone sets its time."""
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
        """Of the samples, in GB/s (10^9 bytes)."""
        return BUFFER_BYTES / statistics.median(self._seconds) / 1e9


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. The host does not wait for the copy, which a round has no time for.

    A GPU copies asynchronously only from pinned memory; torch does not reuse that before the copy is done.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
