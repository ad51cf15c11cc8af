"""A model out of a checkpoint, without a model of transformers in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import LayerWeights

from ..architectures import ARCHITECTURES, LAYERS, check_names, frequencies
from ..files import ModelFileError
from ..head import EarlyExitHead
from ..layers import PartialDepthDecoder
from ..model import LayerSkipModel
from ..named import EMBEDDING, HEAD, NORM
from .checkpoint import Checkpoint

Progress = Callable[[int, int], None]
"""Called after each weight with how many are done, and of how many."""


def build(
    source: str,
    config: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    generation_config: Any = None,
    progress: Progress | None = None,
) -> LayerSkipModel:
    """Read the parameters one by one.

    Parameters
    ----------
    source : str
        For messages.
    config : transformers.PreTrainedConfig
        Of a supported architecture. The model gets a copy without ``quantization_config``.
    checkpoint : Checkpoint
    dtype : torch.dtype
        Of what is not packed, and of the states.
    generation_config : transformers.GenerationConfig, optional
    progress : callable, optional

    Returns
    -------
    LayerSkipModel

    Raises
    ------
    ModelFileError
        If the checkpoint lacks a weight, has one too many, or one of another shape.
    """
    import transformers

    config = without_quantization(config)
    with torch.device("meta"):  # for shapes, and the module of the rotary embedding
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    architecture = ARCHITECTURES[config.model_type]
    named = dict(skeleton.named_parameters(remove_duplicate=False))
    check_names(named, architecture)
    tied = named[HEAD] is named[EMBEDDING]
    wanted = {name: tuple(parameter.shape) for name, parameter in named.items() if not (tied and name == HEAD)}
    checkpoint.check(wanted)
    missing = [name for name in wanted if name not in checkpoint]
    if missing:
        raise ModelFileError(f"{source} lacks {len(missing)} weights that its config.json asks for, first {missing[0]}")
    held: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(wanted.items(), start=1):
        held[name] = checkpoint.parameter(name, shape, dtype)
        if progress is not None:
            progress(number, len(wanted))
    _check_unused(source, checkpoint, tied)
    layers = [
        LayerWeights(**{name: held[f"{LAYERS}.{number}.{path}"] for name, path in architecture.layer_paths.items()})
        for number in range(config.num_hidden_layers)
    ]
    inv_freq, scaling = frequencies(skeleton)
    if checkpoint.frequency_factors is not None:
        inv_freq = inv_freq / checkpoint.frequency_factors
    eps = config.rms_norm_eps
    decoder = PartialDepthDecoder(layers, config.num_key_value_heads, eps, inv_freq, scaling)
    head = EarlyExitHead(held[NORM], held[EMBEDDING if tied else HEAD], eps)
    return LayerSkipModel(
        held[EMBEDDING], decoder, head, config, generation_config or skeleton.generation_config
    ).eval()


def without_quantization(config: Any) -> Any:
    """A copy that says nothing of how a checkpoint was quantized."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _check_unused(source: str, checkpoint: Checkpoint, tied: bool) -> None:
    """A weight that is there and not read would have changed the model."""
    unused = [name for name in checkpoint.unused() if not (tied and name == HEAD)]
    if unused:
        raise ModelFileError(f"{source} has {len(unused)} weights that its config.json does not use, first {unused[0]}")
