"""How the weights of a group are rounded to the values of a format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .formats import Format

_STEPS = 8  # of scales that are tried for a group on either side of what fits its extremes


def fit(form: Format, groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Values, scale and, if the format has it, least of groups: the scale, of some, that loses least in squares.

    Parameters
    ----------
    form : Format
    groups : Tensor [N, G, S], fp32
    importance : Tensor [S], optional
        A factor of the squares; by default all weights count the same.

    Returns
    -------
    tuple of Tensor
        As `pack` takes them.
    """
    if form.has_zero:
        return _fit_range(groups, importance)
    largest = groups.abs().amax(2)
    if form.is_float:
        scale = torch.where(largest > 0, largest / form.range[1], 1.0)
        return (groups / scale[:, :, None]).clamp(*form.range).to(torch.float8_e4m3fn), scale
    if form.bits == 8:
        scale = _rounded(largest / 127)
        return _nearest(groups, scale, -127, 127).to(torch.int8), scale
    # The value that is largest in size becomes -8, the end of the range that has one number more.
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    best = _rounded(extreme / -8)
    values = _nearest(groups, best, -8, 7)
    least_error = _error(groups, values, best, importance)
    for step in range(-_STEPS, _STEPS + 1):
        scale = _rounded(extreme / (-8 + 0.1 * step))
        candidate = _nearest(groups, scale, -8, 7)
        error = _error(groups, candidate, scale, importance)
        better = error < least_error
        best, least_error = torch.where(better, scale, best), torch.where(better, error, least_error)
        values = torch.where(better[:, :, None], candidate, values)
    return values + 8, best


def _fit_range(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Four-bit values, scale and least of groups; the range that is spanned shrinks as long as that loses less."""
    low, high = groups.amin(2), groups.amax(2)
    best_error = torch.full_like(low, float("inf"))
    best = (torch.zeros_like(groups), torch.ones_like(low), low)
    for step in range(_STEPS + 1):
        inset = (high - low) * (0.02 * step)
        least = (low + inset).to(torch.float16).float()
        scale = _rounded((high - low - 2 * inset) / 15)
        values = _nearest(groups - least[:, :, None], scale, 0, 15)
        error = _error(groups - least[:, :, None], values, scale, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        chosen = (better[:, :, None], better, better)
        new = (values, scale, least)
        best = tuple(torch.where(*one) for one in zip(chosen, new, best, strict=True))  # type: ignore[assignment]
    if not bool(best_error.isfinite().all()):
        worst = float((high - low)[~best_error.isfinite()][0])
        raise ValueError(f"fp16 cannot hold the scale of a group that spans {worst:g}")
    return best


def _rounded(scale: Tensor) -> Tensor:
    """To fp16, so that values are rounded to what they will be multiplied by; a group of zeros has scale 1."""
    scale = scale.to(torch.float16).float()
    return torch.where(scale == 0, 1.0, scale)


def _nearest(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (groups / scale[:, :, None]).round_().clamp_(low, high)


def _error(groups: Tensor, values: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    squares = (values * scale[:, :, None] - groups).square()
    return squares.sum(2) if importance is None else squares @ importance
