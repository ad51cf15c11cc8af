"""The memory's own speed: the yardstick of decoding, which reads every weight for every token."""

from __future__ import annotations

import time

import torch

BUFFER_BYTES = 512 * 2**20  # larger than any cache
REPEATS = 7


def measure_read_bandwidth() -> float:
    """Read a buffer with all of torch's threads; the best of several passes, in GB/s (10^9 bytes).

    An integer maximum costs next to nothing per element, so the memory alone sets its time.
    """
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        buffer.amax()
        best = min(best, time.perf_counter() - start)
    return BUFFER_BYTES / best / 1e9
