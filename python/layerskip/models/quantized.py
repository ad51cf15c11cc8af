"""A model with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerskip_kernels import LayerWeights
from layerskip_kernels.formats import FORMATS, format_of, is_packed, named, quantize

from .calibration import Calibration
from .head import EarlyExitHead
from .weights import shared

if TYPE_CHECKING:
    from .model import LayerSkipModel

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""The weights of a layer's matmuls, by their names in `LayerWeights`, in the order in which it reads them."""


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
    total, count = decoder.num_layers * len(MATRICES) + 2 - tied, 0

    def done(weight: Tensor) -> None:
        nonlocal count
        if release:
            weight.data = weight.new_empty(0)  # whoever holds the parameter holds an empty one
        count += 1
        if progress is not None:
            progress(count, total)

    def packed(weight: Tensor, form: str) -> Tensor:
        out = quantize(weight, form)
        done(weight)
        return out

    calibration = Calibration(decoder, [model.embed(ids.view(1, -1)) for ids in texts]) if texts else None
    layers = []
    for number in range(decoder.num_layers):
        layer = decoder.layer(number)
        if calibration is not None:
            layers.append(calibration.pack(number, weights, done))
        else:
            layers.append(layer._replace(**{name: packed(getattr(layer, name), weights) for name in MATRICES}))
    outer = outer_format(weights)
    head_weight = shared(
        packed(head.head_weight, outer)
    )  # one parameter, so that a tied one stays one on another device, too
    embedding = head_weight if tied else packed(model.embedding, outer)
    return type(model)(
        embedding,
        decoder.of(layers),
        EarlyExitHead(head.norm_weight, head_weight, head.eps),
        model.config,
        model.generation_config,
    )


def outer_format(weights: str) -> str:
    """The format of embedding and head beside layers in ``weights``: with four bits they would lose most of all."""
    return "int8" if FORMATS[weights].bits == 4 else weights


def formats(model: LayerSkipModel) -> list[str]:
    """See `LayerSkipModel.weights`."""
    decoder, width = model.decoder, model.decoder.hidden_size
    found = [_format(model.embedding, width), _format(model.head.head_weight, width)]
    for number in range(decoder.num_layers):
        layer = decoder.layer(number)
        widths = {name: width for name in MATRICES} | {"o": layer.q.shape[0], "down": layer.gate.shape[0]}
        found += [_format(getattr(layer, name), widths[name]) for name in MATRICES]
    return sorted(set(found))


def _format(weight: Tensor, width: int) -> str:
    return format_of(weight, width).name if is_packed(weight) else str(weight.dtype).removeprefix("torch.")


def _check_finite(model: LayerSkipModel) -> None:
    named_weights = [(f"layer {number}: {name}", getattr(model.decoder.layer(number), name))
                     for number in range(model.num_layers) for name in MATRICES]  # fmt: skip
    for where, weight in [*named_weights, ("the head", model.head.head_weight), ("the embedding", model.embedding)]:
        broken = (~weight.isfinite().all(1)).nonzero()
        if broken.numel():
            raise ValueError(f"{where}: row {int(broken[0])} of the weight to quantize holds NaN or infinity")


def _check(model: LayerSkipModel, weights: str) -> None:
    first: LayerWeights = model.decoder.layer(0)
    if any(is_packed(one) for one in (model.embedding, model.head.head_weight, first.q)):
        raise ValueError("the model's weights are packed already; quantize the model that it was made from")
    if model.draft_head is not model.head or model.decoder.num_blocks:
        raise ValueError("the model has an exit; quantize the model without it, then give it the exit")
    for name in MATRICES:
        try:
            named(weights, getattr(first, name).shape[1])
        except ValueError as error:
            raise ValueError(f"{name} of the layers: {error}") from None
