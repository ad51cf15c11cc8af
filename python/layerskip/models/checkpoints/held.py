"""The tensors of a model that transformers has loaded, read as those of files are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..architectures import FLOATS, without_leftovers
from ..files import ModelFileError
from ..unsupported import UnsupportedModelError, unsupported
from .tensors import check_tensor

KEEPS_ROWS = "_layerskip_keeps_rows"
"""An attribute of a packed weight that a model of transformers holds, too, which would not know other orders."""


class HeldTensors:
    """The tensors of a model by name, themselves and not copies; it has the methods of `TensorFiles`.

    What decompressing has left beside a weight that is plain now, its scales and zero points, is not among them.

    Parameters
    ----------
    model : torch.nn.Module

    Raises
    ------
    UnsupportedModelError
        If tensors are on the meta device, or on several devices.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[str, Tensor] = without_leftovers(model.state_dict(keep_vars=True))
        self._read: set[str] = set()
        first = next(iter(self._held))
        for name, tensor in self._held.items():
            if tensor.is_meta:
                raise UnsupportedModelError(f"{name} is on the meta device: the model's weights are not loaded")
            if tensor.device != self._held[first].device:
                where = f"{first} on {self._held[first].device}, {name} on {tensor.device}"
                raise unsupported(f"several devices ({where})", "one")

    @property
    def are_plain(self) -> bool:
        """Whether all are floats of 16 or 32 bits, so that no weight is quantized."""
        return all(tensor.dtype in FLOATS for tensor in self._held.values())

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def unused(self) -> list[str]:
        """The names of what was not read."""
        return sorted(self._held.keys() - self._read)

    def is_bytes(self, name: str) -> bool:
        """Whether a tensor is one of bytes."""
        return self._held[name].dtype == torch.uint8

    def read(
        self, name: str, shape: Sequence[int | None] | None, dtype: torch.dtype | None = None, copy: bool = True
    ) -> Tensor:
        """The tensor itself, whatever ``copy`` is: the model holds it anyway.

        Raises
        ------
        ModelFileError
            If it is not there, or of another shape or dtype.
        """
        if name not in self._held:
            raise ModelFileError(f"the model has no {name}")
        self._read.add(name)
        check_tensor(name, self._held[name], shape, dtype)
        setattr(self._held[name], KEEPS_ROWS, True)
        return self._held[name]
