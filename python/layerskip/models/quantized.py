"""A model with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerskip_kernels.formats import FORMATS, format_of, is_packed, named

from .calibration import STACKS, Calibration, nearest
from .head import EarlyExitHead
from .prefill import INPUTS
from .weights import shared

if TYPE_CHECKING:
    from .model import LayerSkipModel

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
    if model.draft_head is not model.head or model.decoder.num_blocks:
        raise ValueError("the model has an exit; quantize the model without it, then give it the exit")
    for name, weight in first.items():
        try:
            named(weights, weight.shape[-1])
        except ValueError as error:
            raise ValueError(f"{name} of the layers: {error}") from None
