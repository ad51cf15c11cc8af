"""The one way in which ops are measured: checked, then timed in turns, cold and warm, beside the memory's speed."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip.bandwidth import ReadBandwidth
from layerskip.cli.machine import processor

ROTATED_BYTES = 256 * 2**20  # of one variant's weights: more than a last-level cache, so that they come from memory
MOST_ERROR = 0.02  # of the largest value; a result in bf16 is rounded by 0.004 of itself, an intermediate one, too
OURS = "cpu"


class WrongResultError(Exception):
    """A variant does not compute what it should, so it is not timed."""


@dataclass
class Variant:
    """One way to compute something.

    ``run(i)`` takes the i-th copy of its weights, of which there are ``copies``; ``values`` are the numbers of its
    result that are compared with the truth. ``bytes_read`` must come from memory at least.
    """

    name: str
    weights: str
    run: Callable[[int], Any]
    copies: int
    bytes_read: int
    truth: Callable[[], Tensor]
    values: Callable[[Any], Tensor] = lambda result: result
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)

    def check(self) -> float:
        """The largest error over the largest true value; WrongResultError if it is too large, or not a number."""
        truth = self.truth().double()
        error = float((self.values(self.run(0)).double() - truth).abs().max() / truth.abs().max())
        if not error <= MOST_ERROR:
            raise WrongResultError(f"{self.name} in {self.weights}: an error of {error:.3g} of the largest value")
        return error


@dataclass
class Group:
    """Ways to compute the same for some rows of a model's shape."""

    op: str
    model: str
    shape: str
    rows: int
    variants: list[Variant]


def copies_of(make: Callable[[], Tensor]) -> list[Tensor]:
    """A tensor, and as many copies as one has to rotate through for none to be in a cache."""
    first = make()
    return [first, *(first.clone() for _ in range(ROTATED_BYTES // first.nbytes))]


def measure(group: Group, repeats: int, memory: ReadBandwidth) -> Iterator[dict[str, Any]]:
    """A row of figures for each variant that is right; all of them take turns, forwards and backwards.

    A cold call takes weights that were not touched for a while, a warm one those of the call before it.
    """
    errors: dict[int, float | str] = {}
    for variant in group.variants:
        try:
            errors[id(variant)] = variant.check()
        except WrongResultError as error:
            errors[id(variant)] = str(error)
    right = [variant for variant in group.variants if isinstance(errors[id(variant)], float)]
    speeds = []
    for number in range(repeats):
        speeds.append(memory.sample())
        for variant in right if number % 2 else right[::-1]:
            copy = (number + 1) % variant.copies
            for seconds in (variant.cold, variant.warm):
                start = time.perf_counter()
                variant.run(copy)
                seconds.append(time.perf_counter() - start)
    for variant in group.variants:
        row = {
            "op": group.op, "model": group.model, "shape": group.shape, "rows": group.rows, "variant": variant.name,
            "weights": variant.weights, "error": errors[id(variant)], "machine": machine(),
        }  # fmt: skip
        if variant.cold:
            row |= {
                "bytes": variant.bytes_read, "memory GB/s": statistics.median(speeds),
                "GB/s": variant.bytes_read / statistics.median(variant.cold) / 1e9,
                "cold": _spread(variant.cold), "warm": _spread(variant.warm), "seconds": variant.cold,
            }  # fmt: skip
        yield row


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p10": deciles[0], "median": statistics.median(seconds), "p90": deciles[-1]}


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "isa": lk.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }
