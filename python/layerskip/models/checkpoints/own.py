"""What ``layerskip quantize`` writes: packed weights as they are, under the names of the plain ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.formats import FORMATS, format_of

from ..._registration import METHOD
from ..files import ModelFileError
from ..unsupported import unsupported
from .checkpoint import SafetensorsCheckpoint, Tensors

VERSION = 1
ROPE_FACTORS = "rope_freqs.weight"
"""What divides the frequencies of the rotary embedding, where that is not what the configuration says."""


def own_settings(formats: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model with weights of these formats."""
    return {"quant_method": METHOD, "version": VERSION, "formats": list(formats)}


class OwnCheckpoint(SafetensorsCheckpoint):
    """Bytes are packed weights, and tensors of floats plain ones."""

    modules = ("layerskip.transformers.packed.PackedLinear", "layerskip.transformers.packed.PackedEmbedding")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        version, self._formats = settings.get("version"), settings.get("formats") or ()
        if version != VERSION:
            raise unsupported(f"version {version!r} of quant_method {METHOD}", f"version {VERSION}")
        for name in self._formats:
            if name not in FORMATS:
                raise unsupported(f"the weight format {name!r}", ", ".join(FORMATS))

    def read_from(self, tensors: Tensors) -> None:
        """See `SafetensorsCheckpoint`."""
        super().read_from(tensors)
        if ROPE_FACTORS in self.files:
            self.frequency_factors = self.files.read(ROPE_FACTORS, [None])

    def is_packed(self, module: str) -> bool:
        """Whether it is stored as bytes."""
        name = self._name(module)
        return name in self.files and self.files.is_bytes(name)

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        """As it is stored."""
        name = self._name(module)
        weight = self.files.read(name, [*shape[:-1], None], torch.uint8)
        try:
            form = format_of(weight, shape[-1])
        except ValueError as error:
            raise ModelFileError(f"{name}: {error}") from None
        if form.name not in self._formats:
            raise ModelFileError(f"{name} is packed in {form.name}, its config.json says {', '.join(self._formats)}")
        return weight

    def _name(self, module: str) -> str:
        """A stack of experts is a parameter, and no module with a weight."""
        return module if module in self.files else f"{module}.weight"
