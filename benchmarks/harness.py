"""The one way in which the benchmarks measure: interleaved, medians, against a named baseline, in a cold cache."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import layerskip_kernels as lk
from layerskip._files import write_atomically

EVICTION_BYTES = 96 * 2**20  # more than a last-level cache, so that weights come from memory, as while decoding


@dataclass
class Case:
    """One thing to time; ``bytes_read`` is what it must read from memory at least."""

    name: str
    run: Callable[[], Any]
    bytes_read: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median time of a call, in seconds."""
        return statistics.median(self.seconds)

    @property
    def bandwidth(self) -> float:
        """Bytes read over the median time, in GB/s."""
        return self.bytes_read / self.median / 1e9


@dataclass
class Result:
    """One line of a report: a figure, what it should be, and what it is relative to."""

    name: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None


def interleave(cases: Sequence[Case], repeats: int, label: str) -> float:
    """Time every case once, then every case again: what disturbs the machine disturbs all of them alike.

    Returns the machine's read bandwidth meanwhile, in GB/s: the median of the passes that evict the caches.
    """
    reads = []
    evict = torch.ones(EVICTION_BYTES // 8, dtype=torch.int64)
    for case in cases:
        case.run()
    for _ in track(range(repeats), label):
        for case in cases:
            start = time.perf_counter()
            evict.amax()
            evicted = time.perf_counter()
            case.run()
            case.seconds.append(time.perf_counter() - evicted)
            reads.append(evicted - start)
    return EVICTION_BYTES / statistics.median(reads) / 1e9


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": lk.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def write(path: Path, results: Sequence[Result]) -> None:
    """Write figures with the machine that gave them."""
    report = {"machine": machine(), "results": [asdict(result) for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
