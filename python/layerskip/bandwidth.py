"""The memory's own speed: the yardstick of decoding, which reads every weight for every token."""

from __future__ import annotations

import statistics
import time

import torch

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
