"""The fused modules in a Hugging Face model, in place, and out again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from layerskip_kernels import BackendError, explain

from ..modules.fused import SkinnyLinear, fuse, unfuse
from .adapters import fusable

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Run the norms, feed-forwards and linear layers of a Hugging Face model through the fused ops, in place.

    ``model(…)`` and ``model.generate(…)`` stay what they are and give the same up to rounding; steps of up to
    `layerskip.modules.fused.SKINNY_ROWS` rows take the ops, prompts and whatever needs a gradient take torch. Attention
    and its cache stay transformers' own. Parameters, the keys of the state dict, hooks, training mode and
    ``save_pretrained`` do not change; a model that is accelerated already is left alone.

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
    found = fusable(model)
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


def _check_served(linear: Any) -> None:
    """A backend that is forced is what was asked for; the reference in place of a missing one is not."""
    weight: Tensor = linear.weight
    served = explain("linear", weight.new_empty(1, weight.shape[1]), weight)
    if served.backend == "reference" and served.skipped:
        raise BackendError(f"accelerate would make the model slower: {served}")
