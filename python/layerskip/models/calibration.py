"""Rounding weights with a look at what they are multiplied by, on a few hundred tokens.

For a matmul whose inputs have the second moments H, rounding a weight by e changes the outputs by e · H · eᵀ in
squares. Column by column, what rounding one does is taken out of the columns that follow, by the inverse of H (GPTQ,
Frantar et al. 2022). Groups, scales and bytes are those of the format, so the result costs what a weight that is
rounded to nearest does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerskip_kernels.formats import Format, named, pack, quantize
from layerskip_kernels.rounding import fit

from .layers import PartialDepthDecoder
from .prefill import INPUTS, Watch

STACKS = ("experts_in", "experts_out")
"""The weights of experts, [N, rows, D], by the names that they are held by: each expert sees few of the tokens."""
DAMPING = 0.01  # of the mean of H's diagonal, added to it: few tokens do not say all


@dataclass
class Moments:
    """Sums of products of inputs, by their name in `INPUTS`."""

    of: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, states: Tensor) -> None:
        """Count states [..., D] in."""
        rows = states.flatten(0, -2).float()
        self.of[name] = self.of.get(name, 0) + rows.T @ rows


class Calibration:
    """Packs a decoder's layers in order; each sees the tokens as the packed layers before it leave them.

    Parameters
    ----------
    decoder : PartialDepthDecoder
        Of plain weights.
    states : sequence of Tensor [1, N, D]
        Embedded texts.
    """

    def __init__(self, decoder: PartialDepthDecoder, states: Sequence[Tensor]) -> None:
        self._decoder, self._states = decoder, list(states)
        self._caches = [decoder.new_cache(1, state.shape[1]) for state in states]

    @torch.no_grad()
    def pack(self, number: int, weights: str, done: Callable[[Tensor], None]) -> dict[str, Tensor]:
        """Layer ``number``, packed; they are asked for in order. ``done`` is called with each weight that is."""
        layer, moments = self._decoder.held(number), Moments()
        self._run(number, layer, moments.add)
        packed = dict(layer)
        for name in filter(layer.__contains__, INPUTS):
            packed[name] = rounded(layer[name], moments.of[INPUTS[name]], weights)
            done(layer[name])
        for name in filter(layer.__contains__, STACKS):
            packed[name] = nearest(layer[name], weights)
            done(layer[name])
        self._states = self._run(number, packed, None)
        return packed

    def _run(self, number: int, held: Mapping[str, Tensor], watch: Watch | None) -> list[Tensor]:
        decoder, layer = self._decoder, self._decoder.made(held)
        return [
            decoder.prefill_layer(number, layer, state, cache, 0, watch)
            for state, cache in zip(self._states, self._caches, strict=True)
        ]


def nearest(weight: Tensor, weights: str) -> Tensor:
    """As `layerskip_kernels.formats.quantize`, of a matrix [N, D] or a stack of them [..., N, D]: [..., N, bytes]."""
    return quantize(weight.flatten(0, -2), weights).unflatten(0, weight.shape[:-1])


def rounded(weight: Tensor, moments: Tensor, weights: str) -> Tensor:
    """A packed weight whose outputs lose little.

    Parameters
    ----------
    weight : Tensor [N, D]
    moments : Tensor [D, D], fp32
        Sums of products of inputs.
    weights : str
        One of `layerskip_kernels.formats.FORMATS`.

    Returns
    -------
    Tensor [N, bytes]
    """
    form = named(weights, weight.shape[1])
    left, size = weight.float().clone(), form.group_size
    spread = _spread(moments)
    importance = moments.diagonal().clamp_min(0)
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, weight.shape[1], size):
        end = first + size
        weighted = importance[first:end] / importance[first:end].mean().clamp_min(1e-12)
        scale, least = _scales(form, left[:, first:end], weighted)
        values, errors = _round_group(form, left[:, first:end], spread[first:end, first:end], scale, least)
        left[:, end:] -= errors @ spread[first:end, end:]
        parts.append((values, scale, least))
    values, scale, least = (torch.stack(part, dim=1) for part in zip(*parts, strict=True))
    values = values.to(torch.float8_e4m3fn) if form.is_float else values.to(torch.int8)
    return pack(form, values, scale, least if form.has_zero else None)


def _spread(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of H⁻¹: row j says where the error of column j goes."""
    damped = moments.clone()
    damped.diagonal().add_(DAMPING * moments.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _scales(form: Format, group: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least [N] of a group [N, S], as rounding to nearest would take them."""
    _, scale, *least = fit(form, group[:, None], importance)
    return scale[:, 0], least[0][:, 0] if least else torch.zeros_like(scale[:, 0])


def _round_group(form: Format, group: Tensor, spread: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, S] as `pack` takes them, and the errors [N, S] that are left to the columns that follow."""
    offset, (low, high) = form.offset, form.range
    values, errors = torch.empty_like(group), torch.empty_like(group)
    for j in range(group.shape[1]):
        wanted = (group[:, j] - least) / scale
        value = wanted.to(torch.float8_e4m3fn).float() if form.is_float else wanted.round()
        value = value.clamp(low, high)
        errors[:, j] = (group[:, j] - least - value * scale) / spread[j, j]
        group[:, j + 1 :] -= errors[:, j, None] * spread[None, j, j + 1 :]
        values[:, j] = value + offset
    return values, errors
