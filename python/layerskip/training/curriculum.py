"""Which exits a step trains, their weights, and layer dropout (LayerSkip, arXiv 2404.16710, §4.1).

Exit layer E in 1…L is the state after E layers, so the paper's x_{l+1} for l = E - 1. Exit L, the last layer, is
trained in every step but those of `ShallowSteps`: without it the layers above the deepest exit get no gradient.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .recipe import SCALES, SHAPES, WEIGHTS, Recipe


def generator(*purpose: object) -> torch.Generator:
    """A CPU generator seeded by ``purpose``, for example ("layer dropout", seed, step)."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _check_exits(exits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The exits ascending, without L."""
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
        Exit layers E in 1…L.
    num_layers : int
        L.
    kind : {"paper", "uniform", "linear", "sqrt", "inverse"}
    scale : float
        At least 0; the weight of the early exits against the last layer.

    Returns
    -------
    Tensor [len(exits)], fp32
        In the order of ``exits``; sums to 1.

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
        last = num_layers - 1 + scale * (num_layers - 2) * (num_layers - 1) / 2
        raw = [scale * (e - 1) * e / 2 if e < num_layers else last for e in exits]
    elif kind in shapes:
        raw = [shapes[kind](e) * (1 if e == num_layers else scale) for e in exits]
    else:
        raise ValueError(f"unknown kind of exit weights {kind!r}, expected one of {', '.join(WEIGHTS)}")
    if sum(raw) <= 0:
        raise ValueError(f"the exits {list(exits)} of {num_layers} layers have no weight with {kind!r}, scale {scale}")
    return torch.tensor(raw, dtype=torch.float64).div_(sum(raw)).float()


class Curriculum(Protocol):
    """The exits that each step trains."""

    def enabled(self, step: int) -> tuple[int, ...]:
        """Exit layers of step t = 0, 1, …, ascending; L is the last, unless the step is shallow."""


class AllExits:
    """Every candidate, every step."""

    def __init__(self, num_layers: int, candidates: Sequence[int] | None = None) -> None:
        self.num_layers = num_layers
        self.candidates = _check_exits(range(1, num_layers) if candidates is None else candidates, num_layers)

    def enabled(self, step: int) -> tuple[int, ...]:
        return *self.candidates, self.num_layers


class RandomExits(AllExits):
    """``per_step`` of the candidates, drawn every step, the same on every rank."""

    def __init__(
        self, num_layers: int, candidates: Sequence[int] | None = None, per_step: int = 2, seed: int = 0
    ) -> None:
        super().__init__(num_layers, candidates)
        if not 0 <= per_step <= len(self.candidates):
            raise ValueError(f"exits_per_step is {per_step}, there are {len(self.candidates)} candidates")
        self.per_step, self.seed = per_step, seed

    def enabled(self, step: int) -> tuple[int, ...]:
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
        return *self.candidates[step % self.interval :: self.interval], self.num_layers


class GradualCurriculum(AllExits):
    """C_grad: from the last layer down, one more candidate every T/(2L) steps; L counts candidates and last layer."""

    def __init__(self, num_layers: int, total_steps: int, candidates: Sequence[int] | None = None) -> None:
        super().__init__(num_layers, candidates)
        if total_steps < 1:
            raise ValueError(f"the total steps of a gradual curriculum must be at least 1, got {total_steps}")
        self.total_steps = total_steps

    def enabled(self, step: int) -> tuple[int, ...]:
        count = len(self.candidates)
        opened = min(2 * (count + 1) * step // self.total_steps, count)
        return *self.candidates[count - opened :], self.num_layers


class ShallowSteps(AllExits):
    """Another curriculum, with a share of steps that leave out the last layer and stop at their deepest early exit.

    A converted model then neither runs nor trains the layers above. Shallow steps are drawn, the same ones on every
    rank. A step without an early exit keeps the last layer.
    """

    def __init__(self, inner: AllExits, share: float, seed: int = 0) -> None:
        super().__init__(inner.num_layers, inner.candidates)
        if not 0 <= share < 1:
            raise ValueError(f"shallow_steps must be in [0, 1), as the last layer needs training too, got {share}")
        self.inner, self.share, self.seed = inner, share, seed

    def enabled(self, step: int) -> tuple[int, ...]:
        exits = self.inner.enabled(step)
        shallow = float(torch.rand((), generator=generator("shallow step", self.seed, step))) < self.share
        return exits[:-1] if shallow and len(exits) > 1 else exits


def layer_dropout_rates(num_layers: int, maximum: float, kind: str | Sequence[float] = "exponential") -> list[float]:
    """Dropout rate of every layer l in 0…L-1.

    exponential, the paper's: (2^(l/(L-1)) - 1) · p_max; linear: l/(L-1) · p_max; uniform: p_max; step: 0 in the lower
    half, p_max in the upper.

    Parameters
    ----------
    num_layers : int
        L.
    maximum : float
        p_max in [0, 1].
    kind : {"exponential", "linear", "uniform", "step"} or sequence of float
        A sequence gives the L rates themselves, none above ``maximum``.

    Raises
    ------
    ValueError
        For a rate outside [0, 1] or above ``maximum``, a wrong length, an unknown kind.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if not 0 <= maximum <= 1:
        raise ValueError(f"the largest dropout rate must be in [0, 1], got {maximum}")
    if not isinstance(kind, str):
        return _given_rates(list(kind), num_layers, maximum)
    last = max(num_layers - 1, 1)
    shapes: dict[str, Callable[[int], float]] = {
        "exponential": lambda layer: 2 ** (layer / last) - 1,
        "linear": lambda layer: layer / last,
        "uniform": lambda layer: 1.0,
        "step": lambda layer: float(2 * layer >= num_layers),
    }
    if kind not in shapes:
        raise ValueError(
            f"unknown kind of layer dropout {kind!r}, expected one of {', '.join(SHAPES)}, or {num_layers} rates"
        )
    return [shapes[kind](layer) * maximum for layer in range(num_layers)]


def _given_rates(rates: list[float], num_layers: int, maximum: float) -> list[float]:
    if len(rates) != num_layers:
        raise ValueError(f"{len(rates)} dropout rates were given for {num_layers} layers")
    for layer, rate in enumerate(rates):
        if not 0 <= rate <= maximum:
            raise ValueError(f"the dropout rate of layer {layer} is {rate}, expected [0, {maximum}]")
    return rates


def dropout_scale(step: int, total_steps: int, kind: str = "constant") -> float:
    """S(t), the factor of the rates at step t in 0…T-1.

    constant: 1, for a model that is already trained; exponential: 2^(t/(T-1)) - 1, for training from scratch.
    """
    if kind == "constant":
        return 1.0
    if kind == "exponential":
        return 2 ** (min(step, total_steps - 1) / max(total_steps - 1, 1)) - 1
    raise ValueError(f"unknown time scale of layer dropout {kind!r}, expected one of {', '.join(SCALES)}")


class LayerDropout:
    """Draw, for a whole step at once, which samples run which layers; kept outputs are not rescaled by 1/(1-p).

    A draw depends on (seed, step, micro-batch) alone: every rank makes the same one, and a resumed run repeats it.

    Parameters
    ----------
    rates : sequence of float
        One per layer, as from `layer_dropout_rates`.
    seed : int
    total_steps : int
        T of `dropout_scale`.
    scale : {"constant", "exponential"}
        Kind of `dropout_scale`.
    """

    def __init__(self, rates: Sequence[float], seed: int = 0, total_steps: int = 1, scale: str = "constant") -> None:
        self.rates = _given_rates(list(rates), len(rates), 1.0)
        self.seed, self.total_steps, self.scale = seed, total_steps, scale
        dropout_scale(0, total_steps, scale)
        self._batch_size: int | None = None
        self._samples: tuple[Tensor, ...] = ()

    def draw(self, step: int, batch_size: int, micro_batch: int = 0, device: str | torch.device = "cpu") -> Tensor:
        """Draw for `samples`; return a mask [L, B] on the CPU, True where a sample runs a layer."""
        rates = torch.tensor(self.rates) * dropout_scale(step, self.total_steps, self.scale)
        source = generator("layer dropout", self.seed, step, micro_batch)
        kept = torch.rand(len(rates), batch_size, generator=source) >= rates[:, None]
        samples = kept.nonzero()[:, 1]
        if torch.device(device).type == "cuda":  # one asynchronous copy for all layers
            samples = samples.pin_memory()
        self._samples = samples.to(device, non_blocking=True).split(kept.sum(1).tolist())
        self._batch_size = batch_size
        return kept

    def samples(self, layer: int, batch_size: int) -> Tensor:
        """Indices of the samples that run ``layer``."""
        if self._batch_size != batch_size:
            drawn = "nothing was drawn" if self._batch_size is None else f"{self._batch_size} were drawn for"
            raise RuntimeError(
                f"layer dropout meets {batch_size} samples but {drawn}; call draw(step, batch_size) first"
            )
        return self._samples[layer]


def apply_to_samples(
    layer: Callable[..., Tensor], samples: Tensor, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run ``layer`` on ``samples`` of ``hidden`` [B, ...] and pass the others through.

    Other arguments that hold one entry per sample, themselves or within tuples, lists and dicts, are sliced alike:
    tensors of two or more dimensions whose first has size B. If no sample runs the layer, it runs on one whose output
    is discarded, so that ranks that drop different layers still join every collective, and parameters get zero
    gradients.

    Raises
    ------
    ValueError
        For a cache object, which would have no entry for the samples that skip the layer.
    """
    batch = hidden.shape[0]
    if samples.shape[0] == batch:
        return layer(hidden, *args, **kwargs)
    run = samples if samples.shape[0] else samples.new_zeros(1)

    def sliced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, run) if value.dim() > 1 and value.shape[0] == batch else value
        if isinstance(value, (tuple, list)):
            return type(value)(sliced(item) for item in value)
        if isinstance(value, dict):
            return {key: sliced(item) for key, item in value.items()}
        if hasattr(value, "update") and hasattr(value, "get_seq_length"):
            raise ValueError(f"layer dropout cannot drop samples from a {type(value).__name__}; pass use_cache=False")
        return value

    out = layer(hidden.index_select(0, run), *sliced(args), **sliced(kwargs))
    return hidden.index_copy(0, samples, out[: samples.shape[0]])


def make_curriculum(recipe: Recipe, num_layers: int, total_steps: int) -> AllExits:
    exits = recipe.exit_layers
    curriculum: AllExits
    if recipe.curriculum == "rotational":
        curriculum = RotationalCurriculum(num_layers, recipe.rotate_every, exits)
    elif recipe.curriculum == "gradual":
        curriculum = GradualCurriculum(num_layers, total_steps, exits)
    elif recipe.curriculum == "random":
        curriculum = RandomExits(num_layers, exits, recipe.exits_per_step, recipe.seed)
    else:
        curriculum = AllExits(num_layers, exits)
    return ShallowSteps(curriculum, recipe.shallow_steps, recipe.seed) if recipe.shallow_steps else curriculum


def make_dropout(recipe: Recipe, num_layers: int, total_steps: int) -> LayerDropout | None:
    """Return the layer dropout of a recipe, or None if no layer is ever dropped."""
    rates = layer_dropout_rates(num_layers, recipe.layer_dropout.max, recipe.layer_dropout.kind)
    return LayerDropout(rates, recipe.seed, total_steps, recipe.layer_dropout.scale) if any(rates) else None


def check_exits(recipe: Recipe, num_layers: int) -> None:
    """Raise ValueError if the exits of a recipe do not fit a model of ``num_layers``."""
    candidates = make_curriculum(recipe, num_layers, 1).candidates
    early_exit_weights((*candidates, num_layers), num_layers, recipe.exit_weights, recipe.exit_weight_scale)
    if recipe.shallow_steps:  # the first exit may be the only one of a step
        early_exit_weights(candidates[:1], num_layers, recipe.exit_weights, recipe.exit_weight_scale)
