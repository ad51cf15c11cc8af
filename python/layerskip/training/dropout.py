"""Layer dropout per sample (LayerSkip, arXiv 2404.16710, §4.1.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._seeds import generator
from .kinds import SCALES, SHAPES


def layer_dropout_rates(num_layers: int, maximum: float, kind: str | Sequence[float] = "exponential") -> list[float]:
    """Rate of every layer l in 0…L-1, from depth alone.

    exponential, the paper's: (2^(l/(L-1)) - 1) · p_max; linear: l/(L-1) · p_max; uniform: p_max; step: 0 in the lower
    half, p_max in the upper.

    Parameters
    ----------
    num_layers : int
        L.
    maximum : float
        p_max in [0, 1].
    kind : {"exponential", "linear", "uniform", "step"} or sequence of float
        A sequence gives the L rates itself, and ``maximum`` bounds them.

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
    """S(t), what the rates are multiplied by at step t in 0…T-1.

    constant: 1, for a model that is already trained; exponential: 2^(t/(T-1)) - 1, for training from scratch.
    """
    if kind == "constant":
        return 1.0
    if kind == "exponential":
        return 2 ** (min(step, total_steps - 1) / max(total_steps - 1, 1)) - 1
    raise ValueError(f"unknown time scale of layer dropout {kind!r}, expected one of {', '.join(SCALES)}")


class LayerDropout:
    """Draws, for a whole step at once, which samples run which layers; kept outputs are not rescaled by 1/(1-p).

    A draw depends on (seed, step, micro-batch) alone: every rank makes the same one, and a resumed run repeats it.

    Parameters
    ----------
    rates : sequence of float
        One a layer, as `layer_dropout_rates` gives them.
    seed : int
    total_steps : int
        T of the time scale.
    scale : {"constant", "exponential"}
        S(t), see `dropout_scale`.
    """

    def __init__(self, rates: Sequence[float], seed: int = 0, total_steps: int = 1, scale: str = "constant") -> None:
        self.rates = _given_rates(list(rates), len(rates), 1.0)
        self.seed, self.total_steps, self.scale = seed, total_steps, scale
        dropout_scale(0, total_steps, scale)
        self._batch_size: int | None = None
        self._samples: tuple[Tensor, ...] = ()

    def draw(self, step: int, batch_size: int, micro_batch: int = 0, device: str | torch.device = "cpu") -> Tensor:
        """Draw what `samples` then gives; returns a mask [L, B] on the CPU, True where a sample runs a layer."""
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

    Every other argument that holds one entry a sample, itself or within tuples, lists and dicts, is sliced alike: a
    tensor of two or more dimensions whose first has size B. Where no sample is left the layer runs on one whose outcome
    is not used: so ranks that drop different layers still meet in every collective, and parameters get zero gradients.

    Raises
    ------
    ValueError
        Where a cache object is passed: it would keep no entry for the samples that skip the layer.
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
