"""A model out of a checkpoint, without a model of transformers in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.formats import kind_of

from ..architectures import check_names
from ..assembly import EMBEDDING, HEAD, assemble, layers_of
from ..families import ARCHITECTURES
from ..files import ModelFileError
from ..model import LayerSkipModel
from ..rotary import exact_module
from ..unsupported import unsupported
from ..weights import shared
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
    skeleton = _skeleton(without_quantization(config))
    config = skeleton.config
    named = dict(skeleton.named_parameters(remove_duplicate=False))
    check_names(named, ARCHITECTURES[config.model_type])
    tied = named[HEAD] is named[EMBEDDING]
    shapes = {name: tuple(weight.shape) for name, weight in named.items() if not (tied and name == HEAD)}
    held = _read(source, shapes, checkpoint, dtype, progress)
    held[EMBEDDING] = shared(held[EMBEDDING])  # one parameter, so that a tied head stays it on another device, too
    unused = [name for name in checkpoint.unused() if not (tied and name == HEAD)]
    if unused:
        raise ModelFileError(f"{source} has {len(unused)} weights that its config.json does not use, first {unused[0]}")
    for number, layer in enumerate(layers_of(config, held)):
        _check_alike(number, layer, config.hidden_size)
    decoder, head = assemble(skeleton, held, checkpoint.frequency_factors)
    generation_config = generation_config or skeleton.generation_config
    return LayerSkipModel(held[EMBEDDING], decoder, head, config, generation_config).eval()


def frequency_factors(model: LayerSkipModel) -> Tensor | None:
    """What divides the frequencies that a model's configuration gives, [C/2]; None where they are the model's."""
    config = without_quantization(model.config)
    form = ARCHITECTURES[config.model_type].form(config, exact_module(_skeleton(config)))
    expected, held = form.rotaries[0].inv_freq, model.decoder.inv_freq
    factors = torch.where(expected == held, 1.0, expected / held)  # some are 0 in both
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5, atol=0) else factors


def without_quantization(config: Any) -> Any:
    """A copy that says nothing of how a checkpoint was quantized."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _skeleton(config: Any) -> Any:
    """A model of transformers without memory, for names and shapes, and the module of the rotary embedding."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _read(
    source: str, shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint, dtype: torch.dtype,
    progress: Progress | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The parameters of these names and shapes, packed or in ``dtype``."""
    checkpoint.check(shapes)
    missing = [name for name in shapes if name not in checkpoint]
    if missing:
        raise ModelFileError(f"{source} lacks {len(missing)} weights that its config.json asks for, first {missing[0]}")
    held = {}
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        held[name] = checkpoint.parameter(name, shape, dtype)
        if progress is not None:
            progress(number, len(shapes))
    return held


def _check_alike(number: int, layer: dict[str, Tensor], width: int) -> None:
    """Matrices that one packing of the states serves are of one kind."""
    for names in (("q", "k", "v"), ("gate", "up")):
        kinds = {name: kind_of(layer[name], width) for name in names if name in layer}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise unsupported(f"layer {number} with {found}", "q, k and v of one kind, and gate and up")
