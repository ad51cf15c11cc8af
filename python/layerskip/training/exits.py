"""Which exits a step trains, and with which weights (LayerSkip, arXiv 2404.16710, §4.1.2).

Exit layer E in 1…L is the state after E layers, so the paper's x_{l+1} for l = E - 1. Exit L, the full depth, is
trained in every step but those that `ShallowSteps` cuts short: without it the blocks above the deepest exit get no
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ._seeds import generator
from .kinds import WEIGHTS


def _check_exits(exits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Ascending, without the full depth."""
    for exit_layer in exits:
        if not 1 <= exit_layer <= num_layers:
            raise ValueError(f"exit layer {exit_layer} is not within 1…{num_layers}")
    if len(set(exits)) != len(exits):
        raise ValueError(f"an exit layer is named twice in {list(exits)}")
    return tuple(sorted(set(exits) - {num_layers}))


def early_exit_weights(exits: Sequence[int], num_layers: int, kind: str = "paper", scale: float = 1.0) -> Tensor:
    """Weights of the enabled exits, ẽ(l) = e(l) / Σ e(i) over them.

    With l = E - 1. paper: e(l) = scale · Σ_{i≤l} i for l < L-1, and e(L-1) = L-1 + scale · Σ_{i≤L-2} i; uniform: 1;
    linear: E; sqrt: √E; inverse: 1/E. All but the paper's multiply the exits below L by ``scale``.

    Parameters
    ----------
    exits : sequence of int
        Exit layers E, in the order in which the weights are wanted.
    num_layers : int
        L.
    kind : {"paper", "uniform", "linear", "sqrt", "inverse"}
    scale : float
        Non-negative; how much the early exits count.

    Returns
    -------
    Tensor [len(exits)], fp32
        Sums to 1.

    Raises
    ------
    ValueError
        For an exit outside 1…L, an unknown kind, a negative scale, weights that are all zero.
    """
    _check_exits(exits, num_layers)
    if scale < 0:
        raise ValueError(f"the scale of exit weights must not be negative, got {scale}")
    shapes = {"uniform": lambda e: 1.0, "linear": float, "sqrt": math.sqrt, "inverse": lambda e: 1 / e}
    if kind == "paper":
        raw = [scale * (e - 1) * e / 2 if e < num_layers else _paper_last(num_layers, scale) for e in exits]
    elif kind in shapes:
        raw = [shapes[kind](e) * (1 if e == num_layers else scale) for e in exits]
    else:
        raise ValueError(f"unknown kind of exit weights {kind!r}, expected one of {', '.join(WEIGHTS)}")
    if sum(raw) <= 0:
        raise ValueError(f"the exits {list(exits)} of {num_layers} layers have no weight with {kind!r}, scale {scale}")
    return torch.tensor(raw, dtype=torch.float64).div_(sum(raw)).float()


def _paper_last(num_layers: int, scale: float) -> float:
    return num_layers - 1 + scale * (num_layers - 2) * (num_layers - 1) / 2


class Curriculum(Protocol):
    """Which exits a step trains."""

    def enabled(self, step: int) -> tuple[int, ...]:
        """Exit layers of step t = 0, 1, …, ascending; the full depth is the last, unless the step is a shallow one."""


class AllExits:
    """Every candidate, every step."""

    def __init__(self, num_layers: int, candidates: Sequence[int] | None = None) -> None:
        self.num_layers = num_layers
        self.candidates = _check_exits(range(1, num_layers) if candidates is None else candidates, num_layers)

    def enabled(self, step: int) -> tuple[int, ...]:
        """See `Curriculum`."""
        return *self.candidates, self.num_layers


class RandomExits(AllExits):
    """``per_step`` of the candidates, drawn anew every step, the same on every rank."""

    def __init__(
        self, num_layers: int, candidates: Sequence[int] | None = None, per_step: int = 2, seed: int = 0
    ) -> None:
        super().__init__(num_layers, candidates)
        if not 0 <= per_step <= len(self.candidates):
            raise ValueError(f"exits_per_step is {per_step}, there are {len(self.candidates)} candidates")
        self.per_step, self.seed = per_step, seed

    def enabled(self, step: int) -> tuple[int, ...]:
        """See `Curriculum`."""
        order = torch.randperm(len(self.candidates), generator=generator("exits", self.seed, step))
        return *sorted(self.candidates[i] for i in order[: self.per_step].tolist()), self.num_layers


class RotationalCurriculum(AllExits):
    """C_rot,R: every R-th candidate, shifted by one each step."""

    def __init__(self, num_layers: int, interval: int, candidates: Sequence[int] | None = None) -> None:
        super().__init__(num_layers, candidates)
        if interval < 1:
            raise ValueError(f"the interval of a rotational curriculum must be at least 1, got {interval}")
        self.interval = interval

    def enabled(self, step: int) -> tuple[int, ...]:
        """See `Curriculum`."""
        return *self.candidates[step % self.interval :: self.interval], self.num_layers


class GradualCurriculum(AllExits):
    """C_grad: from the full depth down, one candidate more every T/(2L) steps, L counting candidates and full depth."""

    def __init__(self, num_layers: int, total_steps: int, candidates: Sequence[int] | None = None) -> None:
        super().__init__(num_layers, candidates)
        if total_steps < 1:
            raise ValueError(f"the total steps of a gradual curriculum must be at least 1, got {total_steps}")
        self.total_steps = total_steps

    def enabled(self, step: int) -> tuple[int, ...]:
        """See `Curriculum`."""
        count = len(self.candidates)
        opened = min(2 * (count + 1) * step // self.total_steps, count)
        return *self.candidates[count - opened :], self.num_layers


class ShallowSteps(AllExits):
    """Another curriculum, of which a share of the steps leaves the full depth out and stops at its deepest early exit.

    A converted model then neither runs nor trains the layers above. Which steps these are is drawn anew every step, the
    same on every rank. A step without an early exit keeps the full depth.
    """

    def __init__(self, inner: AllExits, share: float, seed: int = 0) -> None:
        super().__init__(inner.num_layers, inner.candidates)
        if not 0 <= share < 1:
            raise ValueError(f"shallow_steps must be in [0, 1), as the full depth needs training too, got {share}")
        self.inner, self.share, self.seed = inner, share, seed

    def enabled(self, step: int) -> tuple[int, ...]:
        """See `Curriculum`."""
        exits = self.inner.enabled(step)
        shallow = float(torch.rand((), generator=generator("shallow step", self.seed, step))) < self.share
        return exits[:-1] if shallow and len(exits) > 1 else exits
