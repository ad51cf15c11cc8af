"""Make an early-exit model of a Hugging Face model or of a checkpoint, and the other way around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.formats import dequantize, kind_of

from .._autograd_modes import keeps_grad_mode
from .._imports import check_transformers
from .architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    assemble,
    check_classes,
    check_config,
    check_lora,
    check_parameter_names,
    checked_parameters,
    layers_of,
    named_weights,
)
from .checkpoints.base import Checkpoint, ModelTensors, Progress, without_quantization
from .checkpoints.hf import checkpoint_of, layout_of, method_of
from .files import EMBEDDING, HEAD, LAYERS, NORM, check_names
from .generic_layers import INPUTS
from .head import shared
from .hf_checks import check_hooks, class_of, unsupported, unwrapped
from .model import LayerSkipModel
from .rotary import exact_module

# Modules that hold their weights as they are.
_PLAIN = ("torch.nn.modules.linear.Linear", "torch.nn.modules.sparse.Embedding")


@keeps_grad_mode
def adapt(hf_model: Any) -> LayerSkipModel:
    """Make an early-exit model of a Hugging Face model, which does not change.

    The two share every plain weight, and those that `layerskip.transformers.packed` holds. Weights that another library
    holds quantized are packed anew, a second copy with the same values.

    Parameters
    ----------
    hf_model : transformers.PreTrainedModel
        A causal language model of one of `supported_architectures`, in fp32, bf16 or fp16, on one device; may be
        compiled by ``torch.compile``. Linear layers may be quantized in a layout of `layerskip.models.checkpoints`, by
        modules that hold the tensors as the checkpoint does.

    Returns
    -------
    LayerSkipModel

    Raises
    ------
    UnsupportedModelError
        If the architecture, a way of attending, the type of rotary embedding, the activation, a bias, or the kind of a
        weight (quantised in another way, repacked for a kernel, adapted, of mixed dtype or device, strided) is not
        supported, or a module has a hook, a class or a forward of its own, which would not be called.
    ModelFileError
        If the model's quantized weights are not as its configuration says.
    """
    check_transformers()
    hf_model = unwrapped(hf_model)
    architecture = architecture_of(hf_model)
    check_hooks(hf_model)
    check_lora(hf_model)
    config: Any = hf_model.config
    check_config(without_quantization(config))
    generation_config = getattr(hf_model, "generation_config", None)
    checkpoint = quantized_weights(hf_model, architecture)
    if checkpoint is not None:
        dtype = hf_model.get_parameter(NORM).dtype
        return build("the model", config, checkpoint, dtype, generation_config)
    check_classes(hf_model)
    parameters = checked_parameters(hf_model, architecture)
    decoder, head = assemble(hf_model, parameters)
    return LayerSkipModel(parameters[EMBEDDING], decoder, head, config, generation_config)


def quantized_weights(hf_model: Any, architecture: Architecture) -> Checkpoint | None:
    """The reader of a model that transformers has loaded quantized; None if its weights are plain.

    UnsupportedModelError if the method is not supported, or a module is of a class that repacks its tensors.
    """
    config = hf_model.config
    method = method_of(config)
    if method is None:
        return None
    layout_of(method)
    tensors = ModelTensors(hf_model)
    if tensors.are_plain:
        return None
    checkpoint = checkpoint_of(config)
    paths = [path for name, path in architecture.layer_paths.items() if name in INPUTS]
    layers = (f"{LAYERS}.{number}.{path}" for number in range(config.num_hidden_layers) for path in paths)
    for name in (weight.removesuffix(".weight") for weight in (EMBEDDING, *layers, HEAD)):
        found = class_of(hf_model.get_submodule(name))
        kind = f"{found.__module__}.{found.__name__}"
        if kind not in (*_PLAIN, architecture.embedding_class, *checkpoint.modules):
            raise unsupported(f"{name} of type {kind}", ", ".join(checkpoint.modules))
    if config.tie_word_embeddings and tensors.read(HEAD, None) is not tensors.read(EMBEDDING, None):
        raise unsupported("tie_word_embeddings of a head and an embedding that are not one parameter", "tied ones")
    checkpoint.read_from(tensors)
    checkpoint.take_over(hf_model)
    return checkpoint


@torch.no_grad()
def dequantized(model: LayerSkipModel, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model with the same weights, all of them plain, without an exit's."""
    import transformers

    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    shapes = {name: parameter.shape for name, parameter in made.named_parameters(remove_duplicate=False)}
    state = {}
    for name, weight in named_weights(model).items():
        shape = shapes[name]
        is_vector = len(shape) == 1  # others are matrices, or stacks of them
        plain = weight.to(dtype) if is_vector else dequantize(weight.flatten(0, -2), shape[-1], dtype).view(shape)
        state[name] = plain.clone() if plain.data_ptr() == weight.data_ptr() else plain
    if HEAD not in state:
        state[HEAD] = state[EMBEDDING]
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    rotary = made.model.rotary_emb
    made.model.rotary_emb = type(rotary)(model.config).to(model.device)
    for module in made.modules():
        if hasattr(module, "scalar_embed_scale"):  # of Gemma's embedding, whose tensor is in no checkpoint
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=model.device)
    factors = frequency_factors(model)
    if factors is not None:  # which only a file of one rotary embedding has
        made.model.rotary_emb.inv_freq = model.decoder.inv_freq.to(model.device)
    made.generation_config = model.generation_config or made.generation_config
    return made.eval()


def build(
    source: str,
    config: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    generation_config: Any = None,
    progress: Progress | None = None,
) -> LayerSkipModel:
    """Read a model's parameters one by one; ModelFileError for a missing, superfluous or misshapen one.

    ``config`` is of a supported architecture; the model gets a copy without ``quantization_config``. Plain weights and
    states are in ``dtype``; ``source`` is for messages.
    """
    skeleton = _skeleton(without_quantization(config))
    config = skeleton.config
    named = dict(skeleton.named_parameters(remove_duplicate=False))
    check_parameter_names(named, ARCHITECTURES[config.model_type])
    tied = named[HEAD] is named[EMBEDDING]
    shapes = {name: tuple(weight.shape) for name, weight in named.items() if not (tied and name == HEAD)}
    checkpoint.check(shapes)
    check_names(source, [name for name in shapes if name not in checkpoint], ())
    held = {}
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        held[name] = checkpoint.parameter(name, shape, dtype)
        if progress is not None:
            progress(number, len(shapes))
    held[EMBEDDING] = shared(held[EMBEDDING])  # one parameter, so that a tied head stays tied on any device
    check_names(source, (), [name for name in checkpoint.unused() if not (tied and name == HEAD)])
    for number, layer in enumerate(layers_of(config, held)):
        _check_alike(number, layer, config.hidden_size)
    decoder, head = assemble(skeleton, held, checkpoint.frequency_factors)
    generation_config = generation_config or skeleton.generation_config
    return LayerSkipModel(held[EMBEDDING], decoder, head, config, generation_config).eval()


def frequency_factors(model: LayerSkipModel) -> Tensor | None:
    """Divisors [C/2] of the frequencies that a model's configuration gives; None if they are all 1."""
    config = without_quantization(model.config)
    layer_config = ARCHITECTURES[config.model_type].layer_config(config, exact_module(_skeleton(config)))
    expected, held = layer_config.rotaries[0].inv_freq, model.decoder.inv_freq
    factors = torch.where(expected == held, 1.0, expected / held)  # some are 0 in both
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5, atol=0) else factors


def _skeleton(config: Any) -> Any:
    """A transformers model without memory, for names, shapes, and the module of the rotary embedding."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _check_alike(number: int, layer: dict[str, Tensor], width: int) -> None:
    """Refuse matrices of different kinds that multiply the same states."""
    for names in (("q", "k", "v"), ("gate", "up")):
        kinds = {name: kind_of(layer[name], width) for name in names if name in layer}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise unsupported(f"layer {number} with {found}", "q, k and v of one kind, and gate and up")
