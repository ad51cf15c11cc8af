"""How a Hugging Face model becomes an early-exit model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._extras import check_transformers
from . import checkpoints
from .architectures import architecture_of, check_classes, check_config, checked_parameters
from .assembly import EMBEDDING, HEAD, LAYERS, NORM, assemble
from .checkpoints import HeldTensors, SafetensorsCheckpoint
from .families import Architecture
from .model import LayerSkipModel
from .prefill import INPUTS
from .unsupported import unsupported
from .watch import check_hooks, class_of, unwrapped

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
