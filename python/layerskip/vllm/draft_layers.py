"""The draft layers of a trained exit as layers of vLLM; their keys and values are in the target's cache group."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, replace, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.utils.torch_utils import set_default_torch_dtype

from layerskip_kernels.schemas import layer_shapes

from .. import Exit
from ..models.architectures import ARCHITECTURES, check_model_type


def make_draft_layers(target: Any, exit: Exit, vllm_config: VllmConfig, prefix: str) -> nn.ModuleList:
    """Decoder layers like the target's, with the weights of an exit's draft layers, sharded over ranks.

    vLLM puts their attention into the cache group of the target's layers, because they are alike. So a cached prefix
    keeps their keys and values too. ValueError or NotImplementedError if they do not fit the target's layers.
    """
    check_model_type(target.config.model_type)
    paths = ARCHITECTURES[target.config.model_type].layer_paths
    exit.check_draft_layers(_shapes(target.config, set(paths)))
    dtype, device = vllm_config.model_config.dtype, torch.device(vllm_config.device_config.device)
    config = _unquantised(vllm_config, target.model.layers[0])
    with set_current_vllm_config(config), set_default_torch_dtype(dtype), device:
        kind = type(target.model.layers[0])
        # vLLM reads a layer's number from its name, which may hold but one.
        draft_layers = nn.ModuleList(
            _layer(kind, config, f"{prefix or 'draft_model'}.draft_layer_{number}.layers.0")
            for number in range(exit.num_draft_layers)
        )
    _fill(draft_layers, exit, paths, type(target.model).hf_to_vllm_mapper)
    process_weights_after_loading(draft_layers, vllm_config.model_config, device)
    return draft_layers


def _fill(draft_layers: nn.ModuleList, exit: Exit, paths: Mapping[str, str], mapper: WeightsMapper) -> None:
    """Load the weights as vLLM loads those of a model's layers."""
    like = next(draft_layers.parameters(), exit.norm_weight)
    weights = [
        (f"{number}.{paths[name]}", weight.to(like.device, like.dtype))
        for number, layer in enumerate(exit.draft_layers)
        for name, weight in layer._asdict().items()
        if weight is not None
    ]
    loaded = AutoWeightsLoader(draft_layers).load_weights(weights, mapper=mapper)
    for name, _ in draft_layers.named_parameters():
        if name not in loaded:
            raise NotImplementedError(f"the model's layers have {name}, which no draft layer of an exit has")


def _layer(kind: type[nn.Module], config: VllmConfig, prefix: str) -> nn.Module:
    if issubclass(kind, LlamaDecoderLayer):
        return kind(vllm_config=config, prefix=prefix)
    return kind(config=config.model_config.hf_config, cache_config=config.cache_config, prefix=prefix)


def _unquantised(vllm_config: VllmConfig, layer: nn.Module) -> VllmConfig:
    """The configuration for layers with plain weights and the attention backend of the target's layers.

    vLLM chooses a draft model's backend anew, but the draft layers read the target's metadata.
    """
    backend = next(module.backend for module in layer.modules() if isinstance(module, Attention))
    config = copy.copy(vllm_config)
    config.quant_config = None
    config.attention_config = replace(vllm_config.attention_config, backend=backend)
    return config


def _shapes(config: Any, names: set[str]) -> dict[str, tuple[int, ...] | None]:
    """The shape of each tensor of a layer; None for those that the architecture does not have."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = (config.hidden_size, heads, config.num_key_value_heads, head_dim, config.intermediate_size)
    return {name: shape if name in names else None for name, shape in layer_shapes(*sizes).items()}
