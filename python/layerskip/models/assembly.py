"""Decoder and head out of the parameters that a model of transformers has, whoever read these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .composed import ComposedDecoder
from .families import ARCHITECTURES, norm_form_of
from .form import Form
from .head import EarlyExitHead
from .layers import PartialDepthDecoder
from .rotary import exact_module

LAYERS = "model.layers"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layers_of(config: Any, parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The parameters of each layer, by the names that a decoder holds them by."""
    paths = ARCHITECTURES[config.model_type].layer_paths
    return [
        {name: parameters[f"{LAYERS}.{number}.{path}"] for name, path in paths.items()}
        for number in range(config.num_hidden_layers)
    ]


def assemble(
    model: Any, parameters: Mapping[str, Tensor], frequency_factors: Tensor | None = None
) -> tuple[PartialDepthDecoder, EarlyExitHead]:
    """The decoder and the head of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of a supported architecture, maybe on the meta device; for its configuration and its rotary embedding.
    parameters : mapping
        By the names that transformers gives them; packed or plain.
    frequency_factors : Tensor [C/2], optional
        What divides the frequencies of the rotary embedding.
    """
    config, layers = model.config, layers_of(model.config, parameters)
    form = ARCHITECTURES[config.model_type].form(config, exact_module(model))
    if frequency_factors is not None:
        first, *others = form.rotaries
        form = replace(form, rotaries=(first._replace(inv_freq=first.inv_freq / frequency_factors), *others))
    decoder = _decoder(layers, config.num_key_value_heads, form)
    head = parameters[EMBEDDING if HEAD not in parameters else HEAD]
    return decoder, EarlyExitHead(parameters[NORM], head, form.eps, norm_form=norm_form_of(config))


def _decoder(layers: list[dict[str, Tensor]], num_kv_heads: int, form: Form) -> PartialDepthDecoder:
    if not form.one_call:
        return ComposedDecoder(layers, num_kv_heads, form)
    inv_freq, scaling, _ = form.rotaries[0]
    return PartialDepthDecoder(layers, num_kv_heads, form.eps, inv_freq, scaling, max_positions=form.max_positions)
