"""Rotary embeddings of a model's layers, and the number of positions that they are valid for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LONG = "longrope"  # a type of RoPE with other frequencies for long texts


class Rotary(NamedTuple):
    """One rotary embedding: frequencies ``inv_freq`` [C/2] in fp32, and ``scaling``, a factor of cos and sin.

    With ``rotated``, only the first pairs are scaled; the others have the frequency 0 and are not rotated.
    """

    inv_freq: Tensor
    scaling: float
    rotated: int | None = None

    def tables(self, positions: int, max_positions: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cos and sin of position times frequency, [positions, C/2] in fp32; NaN from position ``max_positions`` on."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.inv_freq
        scaling = torch.full_like(self.inv_freq, self.scaling)
        if self.rotated is not None:
            scaling[self.rotated :] = 1
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        if max_positions is not None:
            cos[max_positions:] = torch.nan
        return cos.to(device), sin.to(device)


def exact_module(model: Any) -> Any:
    """The module of a model's rotary embedding; a new one if a conversion has rounded its frequencies."""
    rotary = model.model.rotary_emb
    if any(buffer.dtype != torch.float32 or buffer.is_meta for buffer in rotary.buffers()):
        rotary = type(rotary)(model.config)
    return rotary


def rotary_of(module: Any, kind: str = "") -> Rotary:
    """The rotary embedding of an `exact_module`, for short texts; ``kind`` is a prefix of the names in the module."""
    inv_freq = getattr(module, f"{kind}original_inv_freq", None)
    inv_freq = getattr(module, f"{kind}inv_freq") if inv_freq is None else inv_freq
    return Rotary(inv_freq.detach().cpu(), float(getattr(module, f"{kind}attention_scaling")))


def rotations(rotary: Rotary, size: int) -> Rotary:
    """The rotary embedding of a head [C] in the order of `pair_order`; ``rotary`` rotates its first values."""
    pairs = rotary.inv_freq.numel()
    still = rotary.inv_freq.new_zeros(size // 2 - pairs)
    return Rotary(torch.cat([rotary.inv_freq, still]), rotary.scaling, pairs)


def pair_order(rotated: int, size: int) -> Tensor:
    """The order of q's and k's values [C] in which the ops' pairs (i, i + C/2) are the pairs (i, i + rotated/2)."""
    values, half = torch.arange(size), rotated // 2
    still = values[rotated:].view(2, -1)
    return torch.cat([values[:half], still[0], values[half:rotated], still[1]])


def rope_parameters(config: Any) -> dict[str, Any]:
    """The parameters as in transformers 5; 4.57 has ``rope_scaling``: None for the default, or with ``type``."""
    if hasattr(config, "rope_parameters"):
        return config.rope_parameters or {}
    scaling = getattr(config, "rope_scaling", None) or {"rope_type": "default"}
    return {"rope_type": scaling.get("type"), **scaling}


def max_positions(config: Any) -> int | None:
    """The number of positions before a sliding window ends or frequencies change (longrope); None for any number.

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
