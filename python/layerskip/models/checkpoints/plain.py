"""Checkpoints of plain weights, packed as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerskip_kernels.formats import named, quantize

from ..named import EMBEDDING, HEAD
from ..quantized import outer_format
from .checkpoint import SafetensorsCheckpoint


class PlainCheckpoint(SafetensorsCheckpoint):
    """What ``save_pretrained`` writes; every matrix is quantized, and the plain one freed, before the next is read.

    Parameters
    ----------
    weights : str
        One of `layerskip_kernels.formats.FORMATS`.
    """

    def __init__(self, weights: str) -> None:
        super().__init__({})
        self._weights = weights

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `Checkpoint`: a format takes widths that are multiples of its groups."""
        for name, shape in shapes.items():
            if len(shape) == 2:
                try:
                    named(self._of(name), shape[1])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

    def is_packed(self, module: str) -> bool:
        """None is."""
        return False

    def parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Checkpoint`. What is quantized was rounded to ``dtype`` before, as a model in it is."""
        if len(shape) != 2:
            return super().parameter(name, shape, dtype)
        return quantize(self.files.read(name, shape, copy=False).to(dtype), self._of(name))

    def _of(self, name: str) -> str:
        """The format of a matrix."""
        return outer_format(self._weights) if name in (EMBEDDING, HEAD) else self._weights
