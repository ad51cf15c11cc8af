"""Adapt a Hugging Face model to an early-exit model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from layerskip_kernels.formats import dequantize

from .._imports import check_transformers
from . import checkpoints
from .architectures import (
    EMBEDDING,
    HEAD,
    LAYERS,
    NORM,
    Architecture,
    architecture_of,
    assemble,
    check_classes,
    check_config,
    checked_parameters,
    named_weights,
)
from .checkpoints import HeldTensors, SafetensorsCheckpoint, frequency_factors
from .hf_checks import check_hooks, class_of, unsupported, unwrapped
from .layers import INPUTS
from .model import LayerSkipModel

_GGUF = "gguf"  # whose weights may have been made plain while they were read
_PLAIN = ("torch.nn.modules.linear.Linear", "torch.nn.modules.sparse.Embedding")


def adapt(hf_model: Any) -> LayerSkipModel:
    """Make an early-exit model of a Hugging Face model. The given one does not change.

    The two share every plain weight, and those that `layerskip.transformers.packed` holds. What another library holds
    quantized is packed anew, a second copy; it keeps its values, and goes on when the given model goes.

    Parameters
    ----------
    hf_model : transformers.PreTrainedModel
        A causal language model of one of `supported_architectures`, in fp32, bf16 or fp16, on one device; or what
        ``torch.compile`` made of it. Linear layers may be quantized in a layout of `layerskip.models.checkpoints`, by
        modules that hold the tensors as the checkpoint does.

    Returns
    -------
    LayerSkipModel

    Raises
    ------
    UnsupportedModelError
        If the architecture, a way of attending, the type of rotary embedding, the activation, a bias, or the kind of a
        weight (quantised in another way, repacked for a kernel, adapted, of mixed dtype or device, strided) is not
        supported, or a module has a hook, a class or a forward of its own, which would not be called. The message names
        it.
    ModelFileError
        If the model's quantized weights are not what its configuration says.
    """
    check_transformers()
    hf_model = unwrapped(hf_model)
    architecture = architecture_of(hf_model)
    check_hooks(hf_model)
    config: Any = hf_model.config
    check_config(checkpoints.without_quantization(config))
    generation_config = getattr(hf_model, "generation_config", None)
    checkpoint = quantized_weights(hf_model, architecture)
    if checkpoint is not None:
        dtype = hf_model.get_parameter(NORM).dtype
        return checkpoints.build("the model", config, checkpoint, dtype, generation_config)
    check_classes(hf_model)
    parameters = checked_parameters(hf_model, architecture)
    decoder, head = assemble(hf_model, parameters)
    return LayerSkipModel(parameters[EMBEDDING], decoder, head, config, generation_config)


def quantized_weights(hf_model: Any, architecture: Architecture) -> SafetensorsCheckpoint | None:
    """What reads the weights of a model that transformers has loaded quantized; None where they are plain.

    Raises
    ------
    UnsupportedModelError
        If the method is not supported, or a module is of a class that repacks its tensors.
    """
    config = hf_model.config
    method = checkpoints.method_of(config)
    if method in (None, _GGUF):
        return None
    layout, tensors = checkpoints.layout_of(method), HeldTensors(hf_model)
    if tensors.are_plain:
        return None
    checkpoint = layout(checkpoints.settings_of(config))
    for name in _matrices(hf_model, architecture):
        found = class_of(hf_model.get_submodule(name))
        kind = f"{found.__module__}.{found.__name__}"
        if kind not in (*_PLAIN, architecture.embedding_class, *checkpoint.modules):
            raise unsupported(f"{name} of type {kind}", ", ".join(checkpoint.modules))
    if config.tie_word_embeddings and tensors.read(HEAD, None) is not tensors.read(EMBEDDING, None):
        raise unsupported("tie_word_embeddings of a head and an embedding that are not one parameter", "tied ones")
    checkpoint.read_from(tensors)
    checkpoint.take_over(hf_model)
    return checkpoint


def _matrices(hf_model: Any, architecture: Architecture) -> Iterator[str]:
    """The modules that hold a model's matrices."""
    paths = [path for name, path in architecture.layer_paths.items() if name in INPUTS]
    layers = (f"{LAYERS}.{number}.{path}" for number in range(hf_model.config.num_hidden_layers) for path in paths)
    for name in (EMBEDDING, *layers, HEAD):
        yield name.removesuffix(".weight")


@torch.no_grad()
def dequantized(model: LayerSkipModel, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers of the same weights, all of them plain.

    Parameters
    ----------
    model : LayerSkipModel
        Made of a model of transformers or a checkpoint; what an exit adds is left out.
    dtype : torch.dtype

    Returns
    -------
    transformers.PreTrainedModel
    """
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
