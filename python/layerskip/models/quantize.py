"""Quantize a model's weights, optionally with calibration (GPTQ, Frantar et al. 2022).

For a matmul whose inputs have the second moments H, rounding a weight by e changes the outputs by e · H · eᵀ in
squares. Column by column, the error of one column is compensated in the columns that follow, by the inverse of H.
Groups, scales and bytes are those of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from layerskip_kernels.formats import Format, fit, format_of, is_packed, lookup, named, pack, quantize

from .files import outer_format
from .generic_layers import INPUTS, Watch
from .head import EarlyExitHead, shared
from .layers import PartialDepthDecoder

STACKS = ("experts_in", "experts_out")
"""Names of the experts' weights [N, rows, D], which are rounded to nearest: each expert sees few of the tokens."""
DAMPING = 0.01  # share of the mean of H's diagonal that is added to it


class Calibration:
    """Pack a decoder's layers in order; each sees the states that the packed layers before it compute.

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
        """Pack layer ``number``; layers come in order. ``done`` is called with each weight that is packed."""
        layer = self._decoder.layer_parameters(number)
        moments: dict[str, Tensor] = {}  # sums of products of inputs, by their names in `INPUTS`

        def add(name: str, states: Tensor) -> None:
            rows = states.flatten(0, -2).float()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        self._run(number, layer, add)
        packed = dict(layer)
        for name in filter(layer.__contains__, INPUTS):
            packed[name] = rounded(layer[name], moments[INPUTS[name]], weights)
            done(layer[name])
        for name in filter(layer.__contains__, STACKS):
            packed[name] = nearest(layer[name], weights)
            done(layer[name])
        self._states = self._run(number, packed, None)
        return packed

    def _run(self, number: int, parameters: Mapping[str, Tensor], watch: Watch | None) -> list[Tensor]:
        decoder, layer = self._decoder, self._decoder.make_weights(parameters)
        return [
            decoder.prefill_layer(number, layer, state, cache, 0, watch)
            for state, cache in zip(self._states, self._caches, strict=True)
        ]


def nearest(weight: Tensor, weights: str) -> Tensor:
    """Round a matrix [N, D] or a stack of them [..., N, D] to nearest: [..., N, bytes]."""
    return quantize(weight.flatten(0, -2), weights).unflatten(0, weight.shape[:-1])


def rounded(weight: Tensor, moments: Tensor, weights: str) -> Tensor:
    """Pack a weight [N, D] so that outputs change little; ``moments`` [D, D] are fp32 sums of products of inputs."""
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
    """The upper Cholesky factor of H⁻¹: row j distributes the error of column j."""
    damped = moments.clone()
    damped.diagonal().add_(DAMPING * moments.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _scales(form: Format, group: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least value [N] of a group [N, S], as for rounding to nearest."""
    _, scale, *least = fit(form, group[:, None], importance)
    return scale[:, 0], least[0][:, 0] if least else torch.zeros_like(scale[:, 0])


def _round_group(form: Format, group: Tensor, spread: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, S] as `pack` takes them, and errors [N, S] for the columns that follow."""
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
"""Names of the weights of a layer's matmuls, in the order of reading."""


@torch.no_grad()
def quantize_model(
    embedding: Tensor,
    decoder: PartialDepthDecoder,
    head: EarlyExitHead,
    weights: str,
    release: bool,
    progress: Callable[[int, int], None] | None,
    texts: Sequence[Tensor],
) -> tuple[Tensor, PartialDepthDecoder, EarlyExitHead]:
    """Embedding, decoder and head, packed, for `LayerSkipModel.quantize`."""
    layers, count = _matrices(decoder), 0
    if any(is_packed(one) for one in (embedding, head.head_weight, layers[0]["o"])):
        raise ValueError("the model's weights are packed already; quantize the model that it was made from")
    for name, weight in layers[0].items():
        try:
            named(weights, weight.shape[-1])
        except ValueError as error:
            raise ValueError(f"{name} of the layers: {error}") from None
    if release:
        _check_finite(embedding, layers, head)  # before anything is freed
    tied = embedding.data_ptr() == head.head_weight.data_ptr()
    total = sum(map(len, layers)) + 2 - tied

    def done(weight: Tensor) -> None:
        nonlocal count
        if release:
            weight.data = weight.new_empty(0)  # every holder of the parameter sees an empty one
        count += 1
        if progress is not None:
            progress(count, total)

    def packed(weight: Tensor, name: str) -> Tensor:
        out = nearest(weight, name)
        done(weight)
        return out

    states = [lookup(embedding, ids.view(1, -1), decoder.hidden_size, decoder.dtype) for ids in texts]
    calibration = Calibration(decoder, states) if texts else None
    if release and calibration is None:
        decoder.release_weights()  # of views, which would keep the memory
    made = []
    for number, matrices in enumerate(layers):
        if calibration is not None:
            made.append(calibration.pack(number, weights, done))
        else:
            made.append(
                decoder.layer_parameters(number) | {name: packed(weight, weights) for name, weight in matrices.items()}
            )
    outer = outer_format(weights)
    head_weight = shared(packed(head.head_weight, outer))  # one parameter, so that a tied one stays tied
    embedding = head_weight if tied else packed(embedding, outer)
    return (
        embedding,
        decoder.with_layers(made),
        EarlyExitHead(head.kept_norm, head_weight, head.eps, norm_spec=head.norm_spec),
    )


def _matrices(decoder: PartialDepthDecoder) -> list[dict[str, Tensor]]:
    """The weights of each layer's matmuls."""
    layers = map(decoder.layer_parameters, range(decoder.num_layers))
    return [{name: held[name] for name in MATRICES if name in held} for held in layers]


def with_widths(embedding: Tensor, decoder: PartialDepthDecoder, head: EarlyExitHead) -> list[tuple[Tensor, int]]:
    """Each matrix or stack of them, the head and the embedding, with the width of its inputs."""
    width, first, held = decoder.hidden_size, decoder.layer(0), decoder.layer_parameters(0)
    widths = {"o": first.q.shape[0]}
    if "experts_in" in held:
        widths["experts_out"] = held["experts_in"].shape[1] // 2
    else:
        widths["down"] = first.gate.shape[0]
    layers = [(weight, widths.get(name, width)) for layer in _matrices(decoder) for name, weight in layer.items()]
    return [*layers, (head.head_weight, width), (embedding, width)]


def format_names(weights: Sequence[tuple[Tensor, int]]) -> list[str]:
    """The names of the formats or dtypes of matrices with the widths of their inputs."""
    return sorted(
        {
            format_of(weight, width).name if is_packed(weight) else str(weight.dtype).removeprefix("torch.")
            for weight, width in weights
        }
    )


def _check_finite(embedding: Tensor, layers: Sequence[dict[str, Tensor]], head: EarlyExitHead) -> None:
    named_weights = [
        (f"layer {number}: {name}", weight)
        for number, matrices in enumerate(layers)
        for name, weight in matrices.items()
    ]
    for where, weight in [*named_weights, ("the head", head.head_weight), ("the embedding", embedding)]:
        broken = (~weight.isfinite().all(-1)).flatten().nonzero()
        if broken.numel():
            raise ValueError(f"{where}: row {int(broken[0])} of the weight to quantize holds NaN or infinity")
