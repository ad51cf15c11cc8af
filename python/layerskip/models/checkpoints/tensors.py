"""The tensors of safetensors files, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..._extras import need
from ..files import ModelFileError, check_safetensors, shards

_BYTES = "U8"  # as safetensors names them


class TensorFiles:
    """The tensors of a model's directory by name. A file is open for one tensor at a time, so no more is in memory.

    Parameters
    ----------
    directory : Path

    Raises
    ------
    FileNotFoundError, ModelFileError
        If a file is missing, truncated or corrupt.
    """

    def __init__(self, directory: Path) -> None:
        self._open = need("safetensors", "reading weights").safe_open
        self._where: dict[str, Path] = {}
        for path in shards(directory):
            check_safetensors(path)
            with self._open(str(path), framework="pt") as file:
                self._where |= dict.fromkeys(file.keys(), path)
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def unused(self) -> list[str]:
        """The names of what was not read."""
        return sorted(self._where.keys() - self._read)

    def is_bytes(self, name: str) -> bool:
        """Whether a tensor is one of bytes."""
        with self._open(str(self._where[name]), framework="pt") as file:
            return bool(file.get_slice(name).get_dtype() == _BYTES)

    def read(
        self, name: str, shape: Sequence[int | None] | None, dtype: torch.dtype | None = None, copy: bool = True
    ) -> Tensor:
        """A tensor, which must have this shape and this dtype, where they are given.

        Raises
        ------
        ModelFileError
            If it is not there, or another one.
        """
        if name not in self._where:
            raise ModelFileError(f"the checkpoint has no {name}")
        with self._open(str(self._where[name]), framework="pt") as file:
            tensor = file.get_tensor(name)
            tensor = tensor.clone() if copy else tensor  # of its own memory, or the file's while it lives
        self._read.add(name)
        check_tensor(name, tensor, shape, dtype)
        return tensor


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int | None] | None, dtype: torch.dtype | None) -> None:
    """Raise ModelFileError for a tensor of another shape or dtype, where they are given."""
    if shape is not None and not _fits(tensor.shape, shape):
        raise ModelFileError(f"{name} has shape {list(tensor.shape)}, its config.json asks for {_told(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ModelFileError(f"{name} has dtype {tensor.dtype}, expected {dtype}")


def _fits(found: Sequence[int], expected: Sequence[int | None]) -> bool:
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(wanted in (None, size) for size, wanted in pairs)


def _told(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('*' if size is None else str(size) for size in shape)}]"
