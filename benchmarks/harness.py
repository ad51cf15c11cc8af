"""The one way in which ops are measured: checked, then timed in turns, cold and warm, beside the memory's speed."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip import devices
from layerskip.cli.options import instructions, processor
from layerskip.devices import ReadBandwidth

from .peers.processes import MissingPeerError

CPU = torch.device("cpu")
ROTATED_BYTES = 256 * 2**20  # of one variant's weights: more than a last-level cache, so that they come from memory
MOST_COPIES = 128  # of small ones, which the memory's measurement drives out of the caches before each turn
MOST_ERROR = 0.02  # of the largest value; a result in bf16 is rounded by 0.004 of itself, an intermediate one, too
MOST_SECONDS, LEAST_CALLS = 0.5, 3  # a variant that took so long for so many calls is called no more
AHEAD_CYCLES = 2_000_000  # of a card: about a millisecond, in which the host gets ahead of it


class WrongResultError(Exception):
    """A variant does not compute what it should, so it is not timed."""


@dataclass
class Variant:
    """One way to compute something, by a backend of this library (``backend``) or by a peer (None).

    ``run(i)`` takes the i-th copy of its weights, of which there are ``copies``, and returns a tensor or some, of which
    ``truth`` are the right values. ``bytes_read`` must come from memory at least.
    """

    name: str
    weights: str
    run: Callable[[int], Any]
    copies: int
    bytes_read: int
    truth: Callable[[], Any]
    version: str = ""
    backend: str | None = None
    most_error: float = MOST_ERROR
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)

    def check(self) -> float:
        """The largest error of a result over its largest true value.

        Raises
        ------
        WrongResultError
            If it is too large, or not a number.
        BackendError, MissingPeerError
            If the backend does not serve the call, or the peer fails.
        """
        try:
            with lk.use_backend(self.backend):
                found = self.run(0)
        except Exception as error:
            if self.backend is not None:
                raise
            raise MissingPeerError(reason(error)) from error
        error = max_error(_several(found), _several(self.truth()))
        if not error <= self.most_error:
            raise WrongResultError(f"{self.name} in {self.weights}: an error of {error:.3g} of the largest value")
        return error

    def take(self, copy: int, device: torch.device) -> None:
        """Time a cold call and, of weights that a cache could hold, a warm one, unless it has taken long enough."""
        if len(self.cold) >= LEAST_CALLS and sum(self.cold) + sum(self.warm) > MOST_SECONDS:
            return
        calls = 1 if self.bytes_read > ROTATED_BYTES else 2
        with lk.use_backend(self.backend):
            times = seconds(lambda: self.run(copy), calls, device)
        for kept, one in zip((self.cold, self.warm), times, strict=False):
            kept.append(one)


@dataclass
class Group:
    """Ways to compute the same for some rows of a model's shape."""

    op: str
    model: str
    shape: str
    rows: int
    variants: list[Variant]


def max_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of each tensor over its largest true value, of these the largest, or NaN.

    Raises
    ------
    WrongResultError
        If a shape is another.
    """
    errors = []
    for one, true in zip(found, truth, strict=True):
        if one.shape != true.shape:
            raise WrongResultError(f"a result of shape {tuple(one.shape)}, expected {tuple(true.shape)}")
        errors.append((one.double() - true.double()).abs().max() / true.double().abs().max())
    return float(torch.stack(errors).amax())  # which is NaN if one is


def _several(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def reason(error: Exception) -> str:
    """Why a peer is skipped. It is others' code, which may raise anything and then stops nobody else's measurement."""
    if isinstance(error, MissingPeerError):
        return str(error)
    return f"it raised {type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def bytes_of(weights: Sequence[Tensor]) -> int:
    """What tensors hold; those of torchao are made of several."""
    total = 0
    for one in weights:
        parts = one.__tensor_flatten__()[0] if hasattr(one, "__tensor_flatten__") else None
        total += one.nbytes if parts is None else bytes_of([getattr(one, name) for name in parts])
    return total


def copies_of(weights: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Weights, and as many copies as one has to rotate through for none to be in a cache."""
    more = min(ROTATED_BYTES // max(bytes_of(weights), 1), MOST_COPIES)
    return [tuple(weights), *(tuple(one.clone() for one in weights) for _ in range(more))]


def seconds(call: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    """How long each of some calls takes, one right after the other: on a card what it takes there, not its launch."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(calls):
            call()
            moments.append(time.perf_counter())
        return [end - start for start, end in pairwise(moments)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda._sleep(AHEAD_CYCLES)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def measure(group: Group, repeats: int, memory: ReadBandwidth, device: torch.device = CPU) -> Iterator[dict[str, Any]]:
    """A row for each variant: figures, what is wrong with it, or why it was skipped.

    Those that are right take turns, forwards and backwards. A cold call takes weights that were not touched for a
    while, a warm one those of the call before it.
    """
    checked = [_checked(variant) for variant in group.variants]
    right = [variant for variant, found in zip(group.variants, checked, strict=True) if "error" in found]
    speeds, calls = [], count(1)
    for number in range(repeats):
        speeds.append(memory.sample())
        for variant in right if number % 2 else right[::-1]:
            variant.take(next(calls) % variant.copies, device)
    for variant, found in zip(group.variants, checked, strict=True):
        row = {
            "op": group.op, "model": group.model, "shape": group.shape, "rows": group.rows, "variant": variant.name,
            "weights": variant.weights, "version": variant.version, **found, "machine": machine(device),
        }  # fmt: skip
        if variant.cold:
            row |= {
                "bytes": variant.bytes_read, "memory GB/s": statistics.median(speeds),
                "GB/s": variant.bytes_read / statistics.median(variant.cold) / 1e9,
                "cold": _spread(variant.cold), "seconds": variant.cold,
            }  # fmt: skip
        if variant.warm:
            row["warm"] = _spread(variant.warm)
        yield row


def _checked(variant: Variant) -> dict[str, Any]:
    """Its error, what is wrong, or why it is skipped, as a part of its row."""
    try:
        return {"error": variant.check()}
    except WrongResultError as error:
        return {"wrong": str(error)}
    except (lk.BackendError, MissingPeerError) as error:
        return {"skipped": str(error)}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p10": deciles[0], "median": statistics.median(seconds), "p90": deciles[-1]}


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "cpu": processor(),
        "device": devices.described(device),
        "threads": torch.get_num_threads(),
        "isa": instructions(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }
