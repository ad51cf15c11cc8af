"""What every kind of checkpoint is read through: the parameters of a model by name, packed where they are stored so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..files import ModelFileError
from .tensors import TensorFiles

if TYPE_CHECKING:
    from torch import nn

# What activations are quantized with, which here they are not, and what can be computed.
_IGNORED = re.compile(
    r"(input|output|k|v|q)_scale$|(input|output)_(zero_point|global_scale)$|rotary_emb\.inv_freq$|\.g_idx$|\.weight_shape$"
)


class Checkpoint(Protocol):
    """The parameters of a model by the names that transformers gives them.

    Attributes
    ----------
    frequency_factors : Tensor [C/2] or None
        What divides the frequencies of the rotary embedding, where the checkpoint and not the configuration says so.
    """

    frequency_factors: Tensor | None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise, before any weight is read, where it cannot give parameters of these shapes."""

    def __contains__(self, name: str) -> bool:
        """Whether it holds a parameter, packed or not."""

    def parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A parameter of that shape: in ``dtype``, or packed, [N, bytes]. It is read once, and not kept."""

    def unused(self) -> list[str]:
        """The names of what was not read and would change the model."""


class Tensors(Protocol):
    """Tensors by name, of files or of a model; see `TensorFiles`."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def unused(self) -> list[str]:
        """The names of what was not read."""

    def is_bytes(self, name: str) -> bool:
        """Whether a tensor is one of bytes."""

    def read(
        self, name: str, shape: Sequence[int | None] | None, dtype: torch.dtype | None = None, copy: bool = True
    ) -> Tensor:
        """A tensor of this shape and this dtype, where they are given."""


class SafetensorsCheckpoint:
    """A checkpoint in safetensors files, or what transformers has loaded from one; each kind is a subclass.

    Parameters
    ----------
    settings : mapping
        The ``quantization_config``.

    Attributes
    ----------
    files : Tensors
        Of the directory that was opened last, or of a model.

    Raises
    ------
    UnsupportedModelError
        If the settings ask for what is not supported.
    """

    files: Tensors

    frequency_factors: Tensor | None = None
    stem = ""
    """What follows the name of a linear layer in the name of its quantized weight."""
    modules: tuple[str, ...] = ()
    """The classes of transformers' modules that hold the tensors as files do. Others repack them for their kernels."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def open(self, directory: Path) -> None:
        """Look for the weights in a directory; errors as of `TensorFiles`."""
        self.read_from(TensorFiles(directory))

    def read_from(self, tensors: Tensors) -> None:
        """Look for the weights among these tensors."""
        self.files = tensors

    def take_over(self, model: nn.Module) -> None:
        """Heed what loading a model has changed in it, other than repacking: nothing, mostly."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `Checkpoint`; what the settings did not tell shows as the weights are read."""
        if not any(self.is_packed(name.removesuffix(".weight")) for name, shape in shapes.items() if len(shape) == 2):
            method = self.settings.get("quant_method")
            raise ModelFileError(f"quantization_config says {method}, but no weight in the files is quantized so")

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        """The packed weight [N, D] of a linear layer, or a stack of them, that is stored quantized."""
        raise NotImplementedError

    def is_packed(self, module: str) -> bool:
        """Whether the weight of a linear layer is stored quantized."""
        return f"{module}{self.stem}" in self.files

    def __contains__(self, name: str) -> bool:
        return name in self.files or self.is_packed(name.removesuffix(".weight"))

    def parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Checkpoint`."""
        module = name.removesuffix(".weight")
        if len(shape) > 1 and self.is_packed(module):
            return self.packed(module, shape)
        return self.files.read(name, shape).to(dtype)

    def unused(self) -> list[str]:
        """See `Checkpoint`: a bias of zeros, as some quantizers write it for every layer, changes nothing."""
        names = [name for name in self.files.unused() if _IGNORED.search(name) is None]
        return [name for name in names if not (name.endswith(".bias") and not self.files.read(name, [None]).any())]
