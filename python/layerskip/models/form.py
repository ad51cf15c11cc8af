"""How the layers and the head of a model are computed, as its configuration says it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from .head import NormForm
from .rotary import Rotary, max_positions, rotary_of, rotations
from .unsupported import unsupported


@dataclass(frozen=True)
class Layout:
    """What a layer computes that `layerskip_kernels.partial_forward` does not.

    Attributes
    ----------
    norm_offset : float
        What is added to the weights of norms.
    gelu : bool
        The activation is the tanh form of GELU, not SiLU.
    rotated : int or None
        How many of a head's values are rotated; None for all.
    windows : tuple of int or None
        How many positions each layer sees, its own included; None for all.
    top_k : int
        How many experts each row has; 0 where there are none.
    shares : bool
        Whether the experts of a row share a weight of 1.
    """

    norm_offset: float = 0.0
    gelu: bool = False
    rotated: int | None = None
    windows: tuple[int | None, ...] = ()
    top_k: int = 0
    shares: bool = False


@dataclass(frozen=True)
class Form:
    """What a decoder and a head are made with, beside their weights.

    Attributes
    ----------
    eps : float
        Of every norm.
    rotaries : tuple of Rotary
    rotary_of : tuple of int
        Which of them each layer has; by default the first.
    max_positions : int or None
        How many positions are computed as the model does; None for any number.
    embedding_scale : float
        What the first layer multiplies its input by.
    rounds_scale : bool
        Whether that factor is rounded to the dtype of the states before.
    layout : Layout or None
        None where `layerskip_kernels.partial_forward` computes the layers.
    """

    eps: float
    rotaries: tuple[Rotary, ...]
    rotary_of: tuple[int, ...] = ()
    max_positions: int | None = None
    embedding_scale: float = 1.0
    rounds_scale: bool = False
    layout: Layout | None = None

    @property
    def one_call(self) -> bool:
        """Whether one op computes any number of these layers, and with embedding and head a whole round."""
        return self.layout is None and len(self.rotaries) == 1 and self.embedding_scale == 1.0


def llama(config: Any, module: Any) -> Form:
    """Pre-norm layers with one rotary embedding."""
    return Form(config.rms_norm_eps, (rotary_of(module),), max_positions=max_positions(config))


def smollm3(config: Any, module: Any) -> Form:
    """Some layers have no rotary embedding, which is one whose frequencies are 0."""
    rotary = rotary_of(module)
    none = Rotary(torch.zeros_like(rotary.inv_freq), 1.0)
    which = tuple(0 if uses else 1 for uses in config.no_rope_layers[: config.num_hidden_layers])
    return Form(config.rms_norm_eps, (rotary, none), which, max_positions(config))


def granite(config: Any, module: Any) -> Form:
    """Factors of embedding, attention, residuals and logits.

    With the residual's factor r and states that are all divided by r, a layer is h + f(norm(h)) as Llama's, for a norm
    does not see the scale of its input but in eps, which becomes eps / r². The attention's factor goes into the rotary
    tables, whose square multiplies the scores.
    """
    residual, scores = config.residual_multiplier, config.attention_multiplier
    for name, factor in (("residual_multiplier", residual), ("attention_multiplier", scores)):
        if factor <= 0:
            raise unsupported(f"{name} {factor}", "a factor above 0")
    return Form(
        config.rms_norm_eps / residual**2,
        (scaled(rotary_of(module), scores),),
        max_positions=max_positions(config),
        embedding_scale=config.embedding_multiplier / residual,
    )


def olmo2(config: Any, module: Any) -> Form:
    """Norms after attention and feed-forward instead of before, and over the whole width of q and k."""
    return Form(config.rms_norm_eps, (rotary_of(module),), max_positions=max_positions(config), layout=Layout())


def olmo3(config: Any, module: Any) -> Form:
    """As OLMo 2, with windows in some layers, which have a rotary embedding of their own."""
    rotaries, which, windows = _by_layer_type(config, module)
    return Form(config.rms_norm_eps, rotaries, which, layout=Layout(windows=windows))


def gemma3(config: Any, module: Any) -> Form:
    """Four norms a layer, whose weights are written less 1; two rotary embeddings; windows; GELU."""
    rotaries, which, windows = _by_layer_type(config, module)
    return Form(
        config.rms_norm_eps,
        tuple(scaled(rotary, config.query_pre_attn_scalar**-0.5) for rotary in rotaries),
        which,
        embedding_scale=config.hidden_size**0.5,
        rounds_scale=True,
        layout=Layout(norm_offset=1.0, gelu=True, windows=windows),
    )


def _by_layer_type(config: Any, module: Any) -> tuple[tuple[Rotary, ...], tuple[int, ...], tuple[int | None, ...]]:
    """Rotary embeddings, which of them each layer has, and its window, where these depend on the type of the layer."""
    if not hasattr(config, "rope_parameters"):
        raise unsupported(f"model_type {config.model_type!r} with a transformers older than 5", "transformers 5")
    kinds = sorted(set(config.layer_types))
    windows = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
    rotaries = tuple(rotary_of(module, f"{kind}_") for kind in kinds)
    return rotaries, tuple(map(kinds.index, config.layer_types)), windows


def mixtral(config: Any, module: Any) -> Form:
    """Experts in the place of the feed-forward."""
    return replace(llama(config, module), layout=Layout(top_k=config.num_experts_per_tok, shares=True))


def qwen3_moe(config: Any, module: Any) -> Form:
    """As Mixtral, where every layer has experts."""
    layout = Layout(top_k=config.num_experts_per_tok, shares=bool(config.norm_topk_prob))
    return replace(llama(config, module), layout=layout)


def phi3(config: Any, module: Any) -> Form:
    """As Llama, or with only some values of a head rotated."""
    form = llama(config, module)
    rotary = form.rotaries[0]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = 2 * rotary.inv_freq.numel()
    if rotated == size:
        return form
    return replace(form, rotaries=(rotations(rotary, size),), layout=Layout(rotated=rotated))


def granite_norm(config: Any) -> NormForm:
    """The factor of the logits goes into the final norm."""
    return NormForm(0.0, 1 / config.logits_scaling)


def gemma_norm(config: Any) -> NormForm:
    """Kept less 1."""
    return NormForm(1.0, 1.0)


def scaled(rotary: Rotary, factor: float) -> Rotary:
    """A rotary embedding that multiplies q · k by ``factor`` in the place of C^-½, which the ops multiply it by."""
    size = 2 * rotary.inv_freq.numel()
    return rotary._replace(scaling=rotary.scaling * math.sqrt(factor * math.sqrt(size)))
