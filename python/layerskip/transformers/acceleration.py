"""Put the fused modules into a Hugging Face model, in place, and take them out again.

A module changes its class and nothing else, so its parameters, their names, hooks and training mode stay the same, also
in copies and checkpoints. The original forward still runs for many rows, where torch's matmuls are faster, for
whatever may need a gradient, and under autocast.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerskip_kernels import BackendError, dispatch, explain, linear, rms_norm, swiglu
from layerskip_kernels.formats import is_packed

from .._imports import check_transformers
from ..models import architectures
from ..models.adaptation import quantized_weights
from ..models.architectures import ACTIVATIONS
from ..models.files import FLOATS, LAYERS, NORM
from ..models.hf_checks import ORIGINAL_CLASS, plain_modules, unwrapped
from .packed import SKINNY_ROWS, PackedLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _served(x: Tensor, *weights: Tensor) -> bool:
    """Whether an op may take ``x``: no gradient, no autocast, and a dtype and device that have kernels."""
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return False
    kind = x.device.type
    if kind not in dispatch.PREFERENCE or torch.is_autocast_enabled(kind):
        return False
    return (
        x.numel() > 0 and x.dtype in FLOATS and all(weight.dtype == x.dtype or is_packed(weight) for weight in weights)
    )


def _is_skinny(x: Tensor) -> bool:
    return x.numel() <= SKINNY_ROWS * x.shape[-1]


class FusedRMSNorm(nn.Module):
    """RMS norm in one pass; ``variance_epsilon`` and ``weight`` are the original module's."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _served(hidden_states, self.weight):
            return _original(self).forward(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return _original(self).extra_repr(self)


class SkinnyLinear(nn.Linear):
    """A linear layer that reads its weight once for up to `SKINNY_ROWS` rows."""

    def forward(self, input: Tensor) -> Tensor:
        tensors = (self.weight,) if self.bias is None else (self.weight, self.bias)
        if not (_is_skinny(input) and _served(input, *tensors)):
            return super().forward(input)
        out = linear(input.reshape(-1, self.in_features), self.weight, self.bias)
        return out.view(*input.shape[:-1], self.out_features)


class FusedSwiGLU(nn.Module):
    """The gated feed-forward: gate, up and activation in one op, down in another."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        projections: Any = (self.gate_proj, self.up_proj, self.down_proj)
        if not (_is_skinny(x) and all(map(_is_bare, projections))):
            return _original(self).forward(self, x)
        gate, up, down = (projection.weight for projection in projections)
        if not _served(x, gate, up, down):
            return _original(self).forward(self, x)
        inner = swiglu(x.reshape(-1, x.shape[-1]), gate, up)
        return linear(inner, down).view(x.shape)


def _is_bare(projection: Any) -> bool:
    """Whether a call of the projection is only its product, without adapter or hook."""
    if type(projection) not in (SkinnyLinear, PackedLinear) or "forward" in projection.__dict__:
        return False
    return not any(getattr(projection, hooks) for hooks in _HOOKS)


def _original(module: nn.Module) -> Any:
    return module.__dict__[ORIGINAL_CLASS]


def fuse(module: nn.Module, fused: type[nn.Module]) -> None:
    """Change the class of ``module`` to ``fused``, if it is another."""
    if not isinstance(module, fused):
        module.__dict__[ORIGINAL_CLASS] = type(module)
        module.__class__ = fused


def unfuse(module: nn.Module) -> None:
    """Restore the class that ``module`` had before `fuse`."""
    original = module.__dict__.pop(ORIGINAL_CLASS, None)
    if original is not None:
        module.__class__ = original


Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Run the norms, feed-forwards and linear layers of a Hugging Face model through the fused ops, in place.

    ``model(…)`` and ``model.generate(…)`` give the same as before, up to rounding. Steps of up to `SKINNY_ROWS` rows
    use the ops; prompts, gradients, and dtypes without an op (after ``model.double()``) use torch. Attention and its
    cache stay transformers' own. Parameters, state dict, hooks, training mode and ``save_pretrained`` do not change.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model of one of `layerskip.supported_architectures`, in fp32, bf16 or fp16, on the device that
        it is to run on. Layers that another library holds quantized stay as they are.

    Returns
    -------
    transformers.PreTrainedModel
        The same object.

    Raises
    ------
    UnsupportedModelError
        If the architecture or a feature of it is not supported. Nothing has changed.
    layerskip_kernels.BackendError
        If only the reference backend is available: the model would become slower.
    """
    check_transformers()
    found = _fusable(unwrapped(model))
    _check_served(unwrapped(model))
    for module, fused in found:
        fuse(module, fused)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; every module gets the class that it had."""
    for module in model.modules():
        unfuse(module)
    return model


def _fusable(hf_model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules that have a fused class, each with that class; attention is not among them."""
    architecture = architectures.architecture_of(hf_model)
    config: Any = hf_model.config
    architectures.check_activation(config)
    if quantized_weights(hf_model, architecture) is None:
        architectures.checked_parameters(hf_model, architecture)
    layers = [f"{LAYERS}.{number}" for number in range(config.num_hidden_layers)]
    names = sorted({path.rpartition(".")[0] for path in architecture.layer_paths.values()})
    paths = [*(f"{layer}.{name}" for layer in layers for name in names), "model.norm", "lm_head"]
    found = dict(plain_modules(hf_model))  # of a layer with LoRA, which calls its base layer, that one
    modules = [found[path] for path in paths]
    fused = [(module, form) for module in modules if (form := _form(module)) is not None]
    blocks = (hf_model.get_submodule(f"{layer}.mlp") for layer in layers)
    gated = [block for block in blocks if architecture.activations == ACTIVATIONS and _is_gated(block)]
    return [*fused, *((block, FusedSwiGLU) for block in gated)]


def _is_gated(block: Any) -> bool:
    """Whether it is a gated feed-forward whose matrices the ops take."""
    matrices = [getattr(block, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(matrix, PackedLinear) or _is_plain(matrix) for matrix in matrices)


def _is_plain(module: Any) -> bool:
    """Whether it is a linear layer with a plain weight."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and weight.dtype in FLOATS


def _form(module: nn.Module) -> type[nn.Module] | None:
    """The fused class of a plain linear layer or a norm; Gemma's norm, whose weight is stored less 1, has none."""
    if _is_plain(module):
        return SkinnyLinear
    return FusedRMSNorm if hasattr(module, "variance_epsilon") else None


def _check_served(hf_model: nn.Module) -> None:
    """Refuse the reference backend unless the user forces it."""
    norm = hf_model.get_parameter(NORM)
    served = explain("rms_norm", norm[None], norm, 1e-5)
    if served.backend == "reference" and served.skipped:
        raise BackendError(f"accelerate would make the model slower: {served}")
