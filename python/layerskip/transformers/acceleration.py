"""Putting the fused modules into a Hugging Face model, in place, and taking them out again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from layerskip_kernels import BackendError, explain

from .._extras import check_transformers
from ..models import architectures
from ..models.adaptation import quantized_weights
from ..models.families import ACTIVATIONS
from ..models.watch import unwrapped
from .fused import FusedRMSNorm, FusedSwiGLU, SkinnyLinear, fuse, unfuse
from .packed import PackedLinear

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Run the norms, feed-forwards and linear layers of a Hugging Face model through the fused ops, in place.

    ``model(…)`` and ``model.generate(…)`` give the same as before, up to rounding. Steps of up to
    `layerskip.transformers.fused.SKINNY_ROWS` rows use the ops; prompts, whatever needs a gradient, and dtypes that the
    ops do not have (after ``model.double()``) use torch.
    Attention and its cache stay transformers' own. Parameters, the keys of the state dict, hooks, training mode and
    ``save_pretrained`` do not change. A model that is accelerated already is left alone.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model of one of `layerskip.supported_architectures`, in fp32, bf16 or fp16, on the one device
        that it is to run on. Layers that another library holds quantized stay as they are.

    Returns
    -------
    transformers.PreTrainedModel
        The same object.

    Raises
    ------
    UnsupportedModelError
        If the architecture or a feature of it is not supported; the message names it and what is. Nothing has changed.
    layerskip_kernels.BackendError
        If only the reference would serve the ops on this machine: the model would become slower.
    """
    check_transformers()
    found = _fusable(unwrapped(model))
    _check_served(unwrapped(model))
    for module, fused in found:
        fuse(module, fused)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; a model that is not accelerated is left alone.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same object; every module in it, itself the same object, is of the class that it had.
    """
    for module in model.modules():
        unfuse(module)
    return model


def _fusable(hf_model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules that have a fused form, each with that form; attention is not among them."""
    architecture = architectures.architecture_of(hf_model)
    config: Any = hf_model.config
    architectures.check_activation(config)
    if quantized_weights(hf_model, architecture) is None:
        architectures.checked_parameters(hf_model, architecture)
    layers = [f"{architectures.LAYERS}.{number}" for number in range(config.num_hidden_layers)]
    names = sorted({path.rpartition(".")[0] for path in architecture.layer_paths.values()})
    paths = [*(f"{layer}.{name}" for layer in layers for name in names), "model.norm", "lm_head"]
    modules = [hf_model.get_submodule(path) for path in paths]
    fused = [(module, form) for module in modules if (form := _form(module)) is not None]
    blocks = (hf_model.get_submodule(f"{layer}.mlp") for layer in layers)
    gated = [block for block in blocks if architecture.activations == ACTIVATIONS and _is_gated(block)]
    return [*fused, *((block, FusedSwiGLU) for block in gated)]


def _is_gated(block: Any) -> bool:
    """Whether it is a gated feed-forward whose matrices the ops take."""
    matrices = [getattr(block, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(matrix, PackedLinear) or _is_plain(matrix) for matrix in matrices)


def _is_plain(module: Any) -> bool:
    """Whether it is a linear layer that holds its weight as it is, and not compressed."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and weight.dtype in architectures.FLOATS


def _form(module: nn.Module) -> type[nn.Module] | None:
    """The fused form of a plain linear layer or a norm; of Gemma's norm, whose weight is kept less 1, there is none."""
    if _is_plain(module):
        return SkinnyLinear
    return FusedRMSNorm if hasattr(module, "variance_epsilon") else None


def _check_served(hf_model: nn.Module) -> None:
    """Refuse the reference where it stands in for a missing backend; where a user forces it, it is what he wants."""
    norm = hf_model.get_parameter(architectures.NORM)
    served = explain("rms_norm", norm[None], norm, 1e-5)
    if served.backend == "reference" and served.skipped:
        raise BackendError(f"accelerate would make the model slower: {served}")
