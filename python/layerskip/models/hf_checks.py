"""Check that a Hugging Face model still computes what was adapted from it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, repeat
from operator import attrgetter, contains, is_, methodcaller
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .._imports import printable


class UnsupportedModelError(ValueError):
    """The kernels do not compute this model, or a feature of it; the message says what they do compute."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def unsupported(what: str, supported: str) -> UnsupportedModelError:
    """The error for ``what``, which names what is supported."""
    return UnsupportedModelError(f"{what} is not supported; supported: {supported}")


def check_one_device(tensors: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModelError for tensors on the meta device, or on several devices."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device: the model's weights are not loaded")
        if tensor.device != first.device:
            raise unsupported(f"several devices ({first_name} on {first.device}, {name} on {tensor.device})", "one")


ORIGINAL_CLASS = "_layerskip_original_class"
"""Where a module that `layerskip.accelerate` has changed keeps the class that it had."""
ORIGINAL_FORWARD = "_layerskip_original_forward"
"""Where a forward that does the same as another, but in training, keeps that one."""
_DTYPE, _ON_CPU = attrgetter("dtype"), attrgetter("is_cpu")
_OF_DICT = methodcaller("values")  # also of the mappings that compressed-tensors puts into the place of dicts
_COMPRESSING = "compressed_tensors."
_HARMLESS = ("transformers.", f"{_COMPRESSING}compressors.", f"{_COMPRESSING}modeling.")
"""Where hooks are defined that look at outputs, or change them in training; that decompress weights; that round what
goes into the cache, which stays exact here."""


class ModelSnapshot:
    """The parts of a Hugging Face model at one time, to be compared with those at a later time.

    It compares identities, which costs little more than a loop over the modules. It keeps the model's parts alive, but
    not the model. UnsupportedModelError as in `check_hooks`.
    """

    def __init__(self, hf_model: nn.Module) -> None:
        check_hooks(hf_model)
        self._model = ref(hf_model)
        modules = list(hf_model.modules())
        # An empty dict can be left out: a module that is added to it is called only by a new forward or module.
        self._module_dicts = [module._modules for module in modules if module._modules]
        self._parameter_dicts: list[Mapping[str, Any]] = [one._parameters for one in modules if one._parameters]
        # Of a quantized model tensors are packed anew, which must follow their values; and some are buffers.
        quantized = getattr(getattr(hf_model, "config", None), "quantization_config", None) is not None
        self._parameter_dicts += [module._buffers for module in modules if quantized and module._buffers]
        self._attributes = [module.__dict__ for module in modules[1:]]
        self._hook_dicts = [hooks for module in modules for hooks in _hooks_of(module)]
        self._hook_dicts += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self._hooks = _values(self._hook_dicts)
        self._modules, self._parameters = _values(self._module_dicts), _values(self._parameter_dicts)
        self._weights = [weight for weight in self._parameters if weight is not None]
        # A conversion may keep the Parameter and replace its data, so dtype and device are compared as well.
        self._dtypes, self._on_cpu = list(map(_DTYPE, self._weights)), list(map(_ON_CPU, self._weights))
        self._num_layers = _num_layers(hf_model)
        self._with_lora = [module for module in modules if has_lora(module)]
        self._active = list(map(lora_is_active, self._with_lora))
        self._copied = self._weights if quantized else []
        self._versions = list(map(_version, self._copied))

    def changed(self) -> nn.Module | None:
        """Return the model if its layers, modules, parameters, or their dtype or device have changed, else None.

        In-place changes of values count only in a quantized model, since plain values are shared. A model that was
        freed has not changed. UnsupportedModelError as in `check_hooks`.
        """
        model = self._model()
        if model is None:
            return None
        overridden = "forward" in model.__dict__ or any(map(contains, self._attributes, repeat("forward")))
        if overridden or (any(self._hook_dicts) and not _same(_values(self._hook_dicts), self._hooks)):
            check_hooks(model)
            self._hooks = _values(self._hook_dicts)
        return None if _num_layers(model) == self._num_layers and self._is_as_it_was() else model

    def _is_as_it_was(self) -> bool:
        return (
            _same(_values(self._module_dicts), self._modules)
            and _same(_values(self._parameter_dicts), self._parameters)
            and list(map(_DTYPE, self._weights)) == self._dtypes
            and list(map(_ON_CPU, self._weights)) == self._on_cpu
            and list(map(_version, self._copied)) == self._versions
            and list(map(lora_is_active, self._with_lora)) == self._active
        )


def check_hooks(model: nn.Module) -> None:
    """Raise UnsupportedModelError for hooks, and forwards of one instance, which would not be called.

    Hooks of transformers itself, and wrappers of compressed-tensors, are allowed.
    """
    for hook in _values((torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)):
        raise UnsupportedModelError(f"{_called(hook)}, a forward hook of all modules, would not be called; remove it")
    for name, module in model.named_modules():
        where = name or "the model"
        for hook in _values(_hooks_of(module)):
            if not _module_of(hook).startswith(_HARMLESS):
                raise UnsupportedModelError(
                    f"{_called(hook)}, a forward hook of {where}, would not be called, and the text could be another "
                    "than the model's; remove it with the handle that registering it returned"
                )
        own = module.__dict__.get("forward")
        if own is not None and not (
            _decompresses(module, own) or _is_of_class(module, getattr(own, ORIGINAL_FORWARD, own))
        ):
            raise UnsupportedModelError(
                f"{where} has a forward of its own, {_called(own)}, which would not be called; delete that attribute "
                "(accelerate's remove_hook_from_module and unwrap_model do, where it is theirs)"
            )


def _decompresses(module: nn.Module, forward: Any) -> bool:
    """Whether a forward is compressed-tensors' wrapper of a compressed weight, or one that moves tensors.

    A weight that is not compressed yet would be rounded at each call.
    """
    home = str(getattr(_function(forward), "__globals__", {}).get("__name__", ""))
    if home.startswith(f"{_COMPRESSING}offload."):
        inner = module.__dict__["_original_forward_func"]
        return _is_of_class(module, inner) or _decompresses(module, inner)
    status = getattr(module, "quantization_status", None)
    return home.startswith(_COMPRESSING) and getattr(status, "value", status) in ("compressed", "decompressed")


def _function(forward: Any) -> Any:
    """The function of a method; accelerate makes methods of methods."""
    while hasattr(forward, "__func__"):
        forward = forward.__func__
    return forward


def _is_of_class(module: nn.Module, forward: Any) -> bool:
    """Whether this is the forward of the module's class, with or without its decorators."""
    forward = _function(forward)
    candidate = class_of(module).forward
    while candidate is not None and candidate is not forward:
        candidate = getattr(candidate, "__wrapped__", None)
    return candidate is not None


def class_of(module: nn.Module) -> Any:
    """The class of a module, before `layerskip.accelerate`."""
    return module.__dict__.get(ORIGINAL_CLASS, type(module))


def has_lora(module: nn.Module) -> bool:
    """Whether PEFT has wrapped this layer for LoRA."""
    return type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "base_layer")


def lora_is_active(layer: Any) -> bool:
    """Whether the layer computes something else than its base layer, as PEFT's forward decides.

    Of a disabled layer, PEFT takes merged adapters out again when it is called next.
    """
    if layer.disable_adapters or layer.merged:
        return bool(layer.disable_adapters and layer.merged)
    held = (getattr(layer, name) for name in layer.adapter_layer_names)
    return any(adapter in adapters for adapters in held for adapter in layer.active_adapters)


def plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name; of a layer with LoRA only its base layer, by the name of the layer."""
    while has_lora(module):
        module = module.get_submodule("base_layer")
    yield name, module
    for part, child in module.named_children():
        yield from plain_modules(child, f"{name}.{part}" if name else part)


def unwrapped(model: Any) -> Any:
    """Return the model inside a wrapper of ``torch.compile`` or PEFT, or the given model; TypeError if it is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel or a LayerSkipModel, got {type(model).__name__}; "
            "layerskip.load and SelfSpeculativeDecoder.from_pretrained take a name or a directory"
        )
    dynamo = sys.modules.get("torch._dynamo")  # without it nothing was compiled
    compiled = dynamo is not None and isinstance(model, dynamo.OptimizedModule)
    model = model._orig_mod if compiled else model
    # PEFT's other models compute more than what they wrap, such as tokens before the prompt.
    is_lora = type(model).__module__ == "peft.peft_model" and type(model.base_model).__name__ == "LoraModel"
    return model.get_base_model() if is_lora else model


def _hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks


def _values(dicts: Iterable[Mapping[Any, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(_OF_DICT, dicts)))


def _num_layers(model: nn.Module) -> int | None:
    """The number of layers that a model calls."""
    num_layers: int | None = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return num_layers


def _version(tensor: Tensor) -> int:
    """The version counter of a tensor; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def _same(now: list[Any], then: list[Any]) -> bool:
    """Whether both hold the same objects; parameters cannot be compared by ``==``."""
    return len(now) == len(then) and all(map(is_, now, then))


def _module_of(hook: Any) -> str:
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


def _called(hook: Any) -> str:
    function = getattr(hook, "func", hook)
    return f"{_module_of(hook)}.{getattr(function, '__qualname__', type(function).__qualname__)}"
