"""Putting the fused modules into a Hugging Face model, in place, and taking them out again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from layerskip_kernels import BackendError, explain

from .._extras import check_transformers
from ..models import architectures
from ..models.families import ACTIVATIONS
from ..models.watch import unwrapped
from .fused import FusedRMSNorm, FusedSwiGLU, SkinnyLinear, fuse, unfuse

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
        that it is to run on.

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
    _check_served(next(module for module, fused in found if fused is SkinnyLinear))
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
    architectures.check_feed_forward(config)
    architectures.checked_parameters(hf_model, architecture)
    layers = [f"{architectures.LAYERS}.{number}" for number in range(config.num_hidden_layers)]
    names = sorted({path.rpartition(".")[0] for path in architecture.layer_paths.values()})
    paths = [*(f"{layer}.{name}" for layer in layers for name in names), "model.norm", "lm_head"]
    modules = [hf_model.get_submodule(path) for path in paths]
    fused = [(module, form) for module in modules if (form := _form(module)) is not None]
    blocks = (hf_model.get_submodule(f"{layer}.mlp") for layer in layers)
    gated = [block for block in blocks if hasattr(block, "gate_proj") and architecture.activations == ACTIVATIONS]
    return [*fused, *((block, FusedSwiGLU) for block in gated)]


def _form(module: nn.Module) -> type[nn.Module] | None:
    """The fused form of a linear layer or a norm; of Gemma's norm, whose weight is kept less 1, there is none."""
    if isinstance(module, nn.Linear):
        return SkinnyLinear
    return FusedRMSNorm if hasattr(module, "variance_epsilon") else None


def _check_served(linear: Any) -> None:
    """Refuse the reference where it stands in for a missing backend; where a user forces it, it is what he wants."""
    weight: Tensor = linear.weight
    served = explain("linear", weight.new_empty(1, weight.shape[1]), weight)
    if served.backend == "reference" and served.skipped:
        raise BackendError(f"accelerate would make the model slower: {served}")
