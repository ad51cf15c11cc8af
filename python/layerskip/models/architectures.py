"""Whether a Hugging Face model is of a supported architecture, in every respect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .assembly import EMBEDDING, HEAD, LAYERS, NORM
from .families import ARCHITECTURES, Architecture, supported_architectures
from .model import LayerSkipModel
from .rotary import check_layer_types, check_rope
from .unsupported import UnsupportedModelError, unsupported
from .watch import class_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KNOWN = ("torch.", "transformers.", "layerskip.", "compressed_tensors.", "liger_kernel.")
_LEFT = ("weight_", "input_", "output_")  # begin the names of scales and zero points beside a weight

Held = TypeVar("Held", bound=Tensor)


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a Hugging Face model, or UnsupportedModelError."""
    if isinstance(model, LayerSkipModel):
        raise UnsupportedModelError(
            f"a LayerSkipModel (weights {model.weights}) was given where a model of transformers with plain weights is "
            "needed"
        )
    _check_adapters(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    ancestors = [ancestor.__name__ for ancestor in type(model).__mro__]
    architecture = ARCHITECTURES.get(str(model_type))
    if architecture is None or architecture.model_class not in ancestors:
        classes = ", ".join(one.model_class for one in ARCHITECTURES.values())
        raise unsupported(
            f"model class {type(model).__name__} of model_type {model_type!r}",
            f"{', '.join(supported_architectures())}, as {classes}",
        )
    _check_depth(model)
    return architecture


def _check_depth(model: Any) -> None:
    """Refuse fewer layers than the configuration says; of more, only the first are used."""
    layers, said = len(model.model.layers), model.config.num_hidden_layers
    if layers < said:
        raise UnsupportedModelError(f"the model has {layers} layers, and config.num_hidden_layers is {said}")


def _check_adapters(model: nn.Module) -> None:
    """Refuse what PEFT has put into a model, or around it."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__module__.startswith("peft."):
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {type(module).__name__} of PEFT: an adapter that is not merged is not "
                "supported; use what merge_and_unload() of the PeftModel returns"
            )


def check_classes(model: nn.Module) -> None:
    """Refuse modules of classes that are somebody's own, maybe with the right parameters, for nobody calls them."""
    for name, module in model.named_modules():
        kind = class_of(module)
        if name and not kind.__module__.startswith(_KNOWN):
            raise unsupported(
                f"{name} of type {kind.__module__}.{kind.__name__}, whose forward would not be called",
                "modules of torch and transformers",
            )


def check_model_type(model_type: object) -> None:
    """Raise UnsupportedModelError for a ``model_type`` that is not in the table."""
    if model_type not in ARCHITECTURES:
        raise unsupported(f"model_type {model_type!r}", ", ".join(supported_architectures()))


def check_config(config: Any) -> None:
    """Refuse by name what the kernels do not compute, as far as the configuration says it.

    Parameters
    ----------
    config : transformers.PreTrainedConfig

    Raises
    ------
    UnsupportedModelError
    """
    check_model_type(config.model_type)
    _check_quantisation(config)
    check_layer_types(config)
    architecture = ARCHITECTURES[config.model_type]
    check_rope(config, architecture.rope_types, architecture.partial_rotary)
    check_activation(config)
    for name, values in architecture.only.items():
        value = getattr(config, name, None)
        if value not in values:
            raise unsupported(f"{name} {value!r}", " or ".join(map(repr, values)))


def check_activation(config: Any) -> None:
    """The check of `check_config` that also applies to a model that keeps its own attention."""
    activations = ARCHITECTURES[config.model_type].activations
    name = "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"
    if getattr(config, name) not in activations:
        raise unsupported(f"{name} {getattr(config, name)!r}", ", ".join(activations))


def checked_parameters(hf_model: nn.Module, architecture: Architecture) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, tied ones under each of their names; UnsupportedModelError for others."""
    parameters = dict(hf_model.named_parameters(remove_duplicate=False))
    if getattr(hf_model.config, "quantization_config", None) is not None:
        parameters = without_leftovers(parameters)
    _check_modules(hf_model, architecture)
    check_names(parameters, architecture)
    _check_tensors(parameters)
    return parameters


def without_leftovers(tensors: Mapping[str, Held]) -> dict[str, Held]:
    """The tensors of a model less what decompressing has left: scales and zero points of weights that are plain now."""
    plain = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dtype in FLOATS}

    def is_left(name: str) -> bool:
        module, _, own = name.rpartition(".")
        return own.startswith(_LEFT) and f"{module}.weight" in plain

    return {name: tensor for name, tensor in tensors.items() if not is_left(name)}


def _check_quantisation(config: Any) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    method = getattr(method, "value", method)
    if method != "gguf":  # whose weights may have been made plain while they were read; they are checked
        raise unsupported(
            f"a transformers model quantised with {method}",
            "plain fp32, bf16 and fp16 weights here; decoding reads others",
        )


def _check_modules(model: nn.Module, architecture: Architecture) -> None:
    """Refuse subclasses of Linear and Embedding, which may compute something else; `layerskip.accelerate`'s do not."""
    for name, module in model.named_modules():
        for plain in (nn.Linear, nn.Embedding):
            own = f"{class_of(module).__module__}.{class_of(module).__name__}"
            if isinstance(module, plain) and class_of(module) is not plain and own != architecture.embedding_class:
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise unsupported(f"{name} of type {kind}", f"plain torch.nn.{plain.__name__}, neither quantised")


def _expected_names(architecture: Architecture, num_layers: int) -> Iterator[str]:
    yield from (EMBEDDING, NORM, HEAD)
    for number in range(num_layers):
        yield from (f"{LAYERS}.{number}.{path}" for path in architecture.layer_paths.values())


def check_names(parameters: dict[str, nn.Parameter], architecture: Architecture) -> None:
    """Raise UnsupportedModelError for a model that has not exactly the parameters that are used."""
    numbers = {int(name.split(".")[2]) for name in parameters if name.startswith(f"{LAYERS}.")}
    expected = dict.fromkeys(_expected_names(architecture, len(numbers)))  # a set in order
    title = architecture.model_class
    for name in parameters:
        if name not in expected:
            raise unsupported(f"parameter {name}", f"in {title}: {', '.join(architecture.layer_paths.values())}")
    for name in expected:
        if name not in parameters:
            raise UnsupportedModelError(f"{title} has no parameter {name}; quantised weights are unsupported")


def _check_tensors(parameters: dict[str, nn.Parameter]) -> None:
    first_name, first = next(iter(parameters.items()))
    for name, tensor in parameters.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
            raise unsupported(f"{name} of type {kind}", "plain tensors, neither quantised nor distributed")
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device: the model's weights are not loaded")
        if tensor.dtype not in FLOATS:
            raise unsupported(f"{name} of dtype {tensor.dtype}", "fp32, bf16 and fp16")
        if tensor.dtype != first.dtype:
            raise unsupported(f"mixed dtypes ({first_name} {first.dtype}, {name} {tensor.dtype})", "one dtype")
        if tensor.device != first.device:
            raise unsupported(f"several devices ({first_name} on {first.device}, {name} on {tensor.device})", "one")
        if not tensor.is_contiguous():
            raise unsupported(f"{name} with strides {tuple(tensor.stride())}", "contiguous weights")
