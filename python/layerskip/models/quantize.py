"""Quantize a model's weights, optionally with calibration (GPTQ, Frantar et al. 2022).

For a matmul whose inputs have the second moments H, rounding a weight by e changes the outputs by e · H · eᵀ in
squares. Column by column, the error of one column is compensated in the columns that follow, by the inverse of H.
Groups, scales and bytes are those of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerskip_kernels.formats import FORMATS, Format, fit, format_of, is_packed, named, pack, quantize

from .head import EarlyExitHead
from .layers import INPUTS, PartialDepthDecoder, Watch, shared

if TYPE_CHECKING:
    from .model import LayerSkipModel


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


MATRICES = (*INPUTS, *STACKS)
"""The weights of a layer's matmuls, by the names that they are held by, in the order in which it reads them."""


@torch.no_grad()
def quantized(
    model: LayerSkipModel,
    weights: str,
    release: bool,
    progress: Callable[[int, int], None] | None,
    texts: Sequence[Tensor],
) -> LayerSkipModel:
    """See `LayerSkipModel.quantize`."""
    decoder, head = model.decoder, model.head
    _check(model, weights)
    if release:
        _check_finite(model)  # before anything is freed
    tied = model.embedding.data_ptr() == head.head_weight.data_ptr()
    total, count = sum(map(len, _matrices(model))) + 2 - tied, 0

    def done(weight: Tensor) -> None:
        nonlocal count
        if release:
            weight.data = weight.new_empty(0)  # whoever holds the parameter holds an empty one
        count += 1
        if progress is not None:
            progress(count, total)

    def packed(weight: Tensor, form: str) -> Tensor:
        out = nearest(weight, form)
        done(weight)
        return out

    calibration = Calibration(decoder, [model.embed(ids.view(1, -1)) for ids in texts]) if texts else None
    if release and calibration is None:
        decoder.let_go()  # of views, which would keep what is freed
    layers = []
    for number, matrices in enumerate(_matrices(model)):
        if calibration is not None:
            layers.append(calibration.pack(number, weights, done))
        else:
            layers.append(decoder.held(number) | {name: packed(weight, weights) for name, weight in matrices.items()})
    outer = outer_format(weights)
    head_weight = shared(
        packed(head.head_weight, outer)
    )  # one parameter, so that a tied one stays one on another device, too
    embedding = head_weight if tied else packed(model.embedding, outer)
    return type(model)(
        embedding,
        decoder.of(layers),
        EarlyExitHead(head.kept_norm, head_weight, head.eps, norm_form=head.norm_form),
        model.config,
        model.generation_config,
    )


def _matrices(model: LayerSkipModel) -> list[dict[str, Tensor]]:
    """The weights of each layer's matmuls."""
    layers = map(model.decoder.held, range(model.num_layers))
    return [{name: held[name] for name in MATRICES if name in held} for held in layers]


def outer_format(weights: str) -> str:
    """The format of embedding and head beside layers in ``weights``: with four bits they would lose most of all."""
    return "int8" if FORMATS[weights].bits == 4 else weights


def with_widths(model: LayerSkipModel) -> list[tuple[Tensor, int]]:
    """Each matrix or stack of them, the head and the embedding, and the width of the states that it multiplies."""
    width, first, held = model.decoder.hidden_size, model.decoder.layer(0), model.decoder.held(0)
    widths = {"o": first.q.shape[0]}
    if "experts_in" in held:
        widths["experts_out"] = held["experts_in"].shape[1] // 2
    else:
        widths["down"] = first.gate.shape[0]
    layers = [(weight, widths.get(name, width)) for held in _matrices(model) for name, weight in held.items()]
    return [*layers, (model.head.head_weight, width), (model.embedding, width)]


def formats(model: LayerSkipModel) -> list[str]:
    """See `LayerSkipModel.weights`."""
    return sorted({_format(weight, width) for weight, width in with_widths(model)})


def _format(weight: Tensor, width: int) -> str:
    return format_of(weight, width).name if is_packed(weight) else str(weight.dtype).removeprefix("torch.")


def _check_finite(model: LayerSkipModel) -> None:
    named_weights = [
        (f"layer {number}: {name}", weight)
        for number, matrices in enumerate(_matrices(model))
        for name, weight in matrices.items()
    ]
    for where, weight in [*named_weights, ("the head", model.head.head_weight), ("the embedding", model.embedding)]:
        broken = (~weight.isfinite().all(-1)).flatten().nonzero()
        if broken.numel():
            raise ValueError(f"{where}: row {int(broken[0])} of the weight to quantize holds NaN or infinity")


def _check(model: LayerSkipModel, weights: str) -> None:
    first = _matrices(model)[0]
    if any(is_packed(one) for one in (model.embedding, model.head.head_weight, first["o"])):
        raise ValueError("the model's weights are packed already; quantize the model that it was made from")
    if model.draft_head is not model.head or model.decoder.num_draft_layers:
        raise ValueError("the model has an exit; quantize the model without it, then give it the exit")
    for name, weight in first.items():
        try:
            named(weights, weight.shape[-1])
        except ValueError as error:
            raise ValueError(f"{name} of the layers: {error}") from None
