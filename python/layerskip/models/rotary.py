"""Rotary embeddings as the layers of a model have them, and how far they and sliding windows serve."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hf_checks import unsupported

STATIC = ("default", "llama3", "linear", "yarn")
"""Types of RoPE whose frequencies do not depend on the length of the text."""
LONG = "longrope"
"""A type with other frequencies for texts that are longer than those that the model was first trained with."""


class Rotary(NamedTuple):
    """One rotary embedding: frequencies ``inv_freq`` [C/2] in fp32, and ``scaling``, a factor of cos and sin.

    Where ``rotated`` is given, only so many pairs are scaled; the others have the frequency 0 and stay as they are.
    """

    inv_freq: Tensor
    scaling: float
    rotated: int | None = None

    def tables(self, positions: int, most: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cos and sin of position times frequency, [positions, C/2] in fp32; NaN from position ``most`` on."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.inv_freq
        scaling = torch.full_like(self.inv_freq, self.scaling)
        if self.rotated is not None:
            scaling[self.rotated :] = 1
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        if most is not None:
            cos[most:] = torch.nan
        return cos.to(device), sin.to(device)


def exact_module(model: Any) -> Any:
    """The module of a model's rotary embedding, with exact frequencies.

    A conversion such as ``model.to(torch.bfloat16)`` rounds the frequencies, too, and a model on the meta device has
    none; then a new module gives exact ones.
    """
    rotary = model.model.rotary_emb
    if any(buffer.dtype != torch.float32 or buffer.is_meta for buffer in rotary.buffers()):
        rotary = type(rotary)(model.config)
    return rotary


def rotary_of(module: Any, kind: str = "") -> Rotary:
    """The rotary embedding of a module, or the one that it has for layers of a kind; for short texts, if that matters.

    Parameters
    ----------
    module : torch.nn.Module
        Of `exact_module`.
    kind : str
        A prefix of the names in the module.
    """
    inv_freq = getattr(module, f"{kind}original_inv_freq", None)
    inv_freq = getattr(module, f"{kind}inv_freq") if inv_freq is None else inv_freq
    return Rotary(inv_freq.detach().cpu(), float(getattr(module, f"{kind}attention_scaling")))


def rotations(rotary: Rotary, size: int) -> Rotary:
    """The rotary embedding of a whole head [C] of which ``rotary`` rotates the first values.

    Rotated pairs come first: it is for heads whose values are put in the order of `pair_order`.
    """
    pairs = rotary.inv_freq.numel()
    still = rotary.inv_freq.new_zeros(size // 2 - pairs)
    return Rotary(torch.cat([rotary.inv_freq, still]), rotary.scaling, pairs)


def pair_order(rotated: int, size: int) -> Tensor:
    """The order of a head's values [C] in which the ops' pairs (i, i + C/2) are the pairs (i, i + rotated/2) to rotate.

    q and k are both put in it, so that their product is the same.
    """
    values, half = torch.arange(size), rotated // 2
    still = values[rotated:].view(2, -1)
    return torch.cat([values[:half], still[0], values[half:rotated], still[1]])


def check_rope(config: Any, types: tuple[str, ...], partial: bool) -> None:
    """Raise UnsupportedModelError for a type of RoPE that is none of ``types`` and, unless it may be, a partial one."""
    for parameters in _each_rope(config):
        rope_type = parameters.get("rope_type")
        if rope_type not in types:
            raise unsupported(f"RoPE type {rope_type!r}", ", ".join(types))
        for factor in (parameters.get("partial_rotary_factor"), getattr(config, "partial_rotary_factor", None)):
            if factor not in (None, 1) and not partial:
                raise unsupported(
                    f"partial rotary embedding (partial_rotary_factor {factor})", "partial_rotary_factor 1"
                )


def _each_rope(config: Any) -> list[dict[str, Any]]:
    """The parameters of one rotary embedding, or of one for each type of layers."""
    parameters = rope_parameters(config)
    by_type = [value for value in parameters.values() if isinstance(value, dict)]
    return by_type or [parameters]


def rope_parameters(config: Any) -> dict[str, Any]:
    """As transformers 5 has them. 4.57 has ``rope_scaling``: None for the default, and maybe ``type`` in it."""
    if hasattr(config, "rope_parameters"):
        return config.rope_parameters or {}
    scaling = getattr(config, "rope_scaling", None) or {"rope_type": "default"}
    return {"rope_type": scaling.get("type"), **scaling}


def max_positions(config: Any) -> int | None:
    """How many positions a model has in which no sliding window ends and no frequency changes; None for any number.

    Qwen marks the layers with a window in ``layer_types``, Mistral and Phi-3 have one for all layers.
    """
    limits = []
    layer_types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is not None and (layer_types is None or "sliding_attention" in layer_types):
        limits.append(int(window))
    parameters = rope_parameters(config)
    if parameters.get("rope_type") == LONG:
        limits.append(
            int(parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        )
    return min(limits, default=None)


def check_layer_types(config: Any) -> None:
    """Raise UnsupportedModelError for layers that attend in another way than to all positions or to a window."""
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        raise unsupported(f"layer type {min(others)!r}", "full_attention, sliding_attention")
