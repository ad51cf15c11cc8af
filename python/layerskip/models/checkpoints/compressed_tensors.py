"""compressed-tensors: what llm-compressor writes; weights of integers, in words or bytes, and of float8.

``weight_packed`` [N, D · bits / 32] or ``weight`` [N, D], with ``weight_scale`` [N, G], [N, 1] or [1], and, in words
along the outputs, ``weight_zero_point`` [N · bits / 32, G].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..files import ModelFileError
from ..unsupported import unsupported
from .checkpoint import SafetensorsCheckpoint
from .integers import check_group_size, packed_floats, packed_integers, unpacked

# The ways of writing weights: their kind, and the numbers of bits that are supported.
_FORMATS = {
    "pack-quantized": ("int", (4, 8)),
    "int-quantized": ("int", (8,)),
    "float-quantized": ("float", (8,)),
    "naive-quantized": ("float", (8,)),
}
_STRATEGIES = ("group", "channel", "tensor", "block")


class CompressedTensorsCheckpoint(SafetensorsCheckpoint):
    """Activations stay as they are, whatever the configuration says of them: that loses nothing."""

    stem = ".weight_scale"
    modules = ("torch.nn.modules.linear.Linear",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise unsupported(f"compressed-tensors with sparsity {sparsity!r}", "dense")
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise unsupported("compressed-tensors with transforms (transform_config)", "weights without them")
        self._groups = list((settings.get("config_groups") or {}).values())
        if not self._groups:
            raise unsupported("compressed-tensors without config_groups", "groups with weights")
        for group in self._groups:
            _check(self._format(group), group.get("weights") or {})

    def _format(self, group: Mapping[str, Any]) -> str:
        return str(group.get("format") or self.settings.get("format"))

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        """See `SafetensorsCheckpoint`."""
        group = self._group_of(module)
        name, bits = f"{module}.weight", group["weights"]["num_bits"]
        scale = self._scale(name, shape, group["weights"])
        blocks = group["weights"]["strategy"] == "block"
        size = group["weights"]["block_structure"][1] if blocks else group["weights"].get("group_size")
        if group["weights"]["type"] == "float":
            return packed_floats(name, self.files.read(name, shape, torch.float8_e4m3fn), scale, size)
        if self._format(group) == "int-quantized":
            values = self.files.read(name, shape, torch.int8).view(torch.uint8) ^ 128
        else:
            words = self.files.read(f"{name}_packed", [shape[0], -(-shape[1] * bits // 32)], torch.int32)
            values = unpacked(words, bits)[:, : shape[1]]
        return packed_integers(name, bits, values, scale, self._zero(name, bits, scale), size)

    def _group_of(self, module: str) -> Mapping[str, Any]:
        """The group that names a linear layer: itself, by a pattern, or as one of all."""
        for group in self._groups:
            for target in group.get("targets") or ():
                named = re.match(target[3:], module) if target.startswith("re:") else module.endswith(target)
                if named or target == "Linear":
                    return group
        raise ModelFileError(f"{module} is quantized, but no group of config_groups has it for a target")

    def _scale(self, name: str, shape: Sequence[int], weights: Mapping[str, Any]) -> Tensor:
        """The scales [N, G]."""
        stored = self.files.read(f"{name}_scale", None)
        if weights["strategy"] == "block":
            rows = weights["block_structure"][0]
            return stored.repeat_interleave(rows, dim=0)[: shape[0]]
        if stored.numel() == 1:
            return stored.reshape(1, 1).expand(shape[0], 1)
        if stored.dim() != 2 or stored.shape[0] != shape[0]:
            raise ModelFileError(f"{name}_scale has shape {list(stored.shape)}, expected [{shape[0]}, *]")
        return stored

    def _zero(self, name: str, bits: int, scale: Tensor) -> Tensor | None:
        """Zero points [N, G], unsigned as the values are."""
        name, middle = f"{name}_zero_point", 1 << (bits - 1)
        if name not in self.files:
            return None
        stored = self.files.read(name, [None, scale.shape[1]])
        if stored.dtype != torch.int32:
            return stored.reshape(-1, scale.shape[1]).expand_as(scale).int() + middle
        return unpacked(stored.t(), bits)[:, : scale.shape[0]].t()


def _check(form: str, weights: Mapping[str, Any]) -> None:
    """Refuse what is not read, by its name in the configuration."""
    if form not in _FORMATS:
        raise unsupported(f"compressed-tensors in the format {form!r}", ", ".join(_FORMATS))
    kind, bits = _FORMATS[form]
    found = (weights.get("type"), weights.get("num_bits"))
    if found[0] != kind or found[1] not in bits:
        what = " or ".join(f"{kind} of {one} bits" for one in bits)
        raise unsupported(f"compressed-tensors {form} with {found[0]} of {found[1]} bits", what)
    if weights.get("strategy") not in _STRATEGIES:
        raise unsupported(f"compressed-tensors with the strategy {weights.get('strategy')!r}", ", ".join(_STRATEGIES))
    if found == ("int", 8) and not weights.get("symmetric", True):
        raise unsupported("compressed-tensors with 8-bit weights that are not symmetric", "symmetric true")
    check_group_size("compressed-tensors", weights.get("group_size"))
    if weights.get("actorder") in ("group", True):
        raise unsupported("compressed-tensors with actorder 'group'", "actorder null, 'weight' and 'static'")
