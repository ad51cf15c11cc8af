"""Read the parameters of a checkpoint: tensors of safetensors files or of loaded models, packed or to be packed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerskip_kernels.formats import named, quantize

from ..._imports import need
from ..files import (
    EMBEDDING,
    FLOATS,
    HEAD,
    ModelFileError,
    check_safetensors,
    outer_format,
    reading,
    shards,
    without_leftovers,
)
from ..hf_checks import check_one_device

Progress = Callable[[int, int], None]
"""Called after each weight with the number of weights done, and of all."""
KEEPS_ROWS = "_layerskip_keeps_rows"
"""Attribute of a packed weight that a transformers model holds, too, and that must keep its row order."""
_BYTES = "U8"  # the dtype's name in safetensors
# Quantization of activations, which is not applied here, and tensors that can be recomputed.
_IGNORED = re.compile(
    r"(input|output|k|v|q)_scale$|(input|output)_(zero_point|global_scale)$|rotary_emb\.inv_freq$|\.g_idx$|\.weight_shape$"
)


class Tensors:
    """Tensors by name; remembers which were read."""

    owner = "checkpoint"

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def unused(self) -> list[str]:
        return sorted(set(self._names) - self._used)

    def is_bytes(self, name: str) -> bool:
        raise NotImplementedError

    def read(
        self, name: str, shape: Sequence[int | None] | None, dtype: torch.dtype | None = None, copy: bool = True
    ) -> Tensor:
        """Read a tensor; ModelFileError if it is missing, or has another shape or dtype than those given."""
        if name not in self:
            raise ModelFileError(f"the {self.owner} has no {name}")
        tensor = self._get(name, copy)
        self._used.add(name)
        found = tensor.shape
        if shape is not None and (
            len(found) != len(shape) or any(size not in (None, own) for size, own in zip(shape, found, strict=True))
        ):
            expected = ", ".join("*" if size is None else str(size) for size in shape)
            raise ModelFileError(f"{name} has shape {list(found)}, its config.json asks for [{expected}]")
        if dtype is not None and tensor.dtype != dtype:
            raise ModelFileError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
        return tensor

    def _get(self, name: str, copy: bool) -> Tensor:
        raise NotImplementedError


class TensorFiles(Tensors):
    """The tensors of a model's directory. Files are opened for one tensor at a time, so no more is in memory.

    Raises FileNotFoundError or ModelFileError if a file is missing, truncated or corrupt.
    """

    def __init__(self, directory: Path) -> None:
        self._open = need("safetensors", "reading weights").safe_open
        self._files: dict[str, Path] = {}
        for path in shards(directory):
            check_safetensors(path)
            with self._open(str(path), framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        super().__init__(self._files)

    def is_bytes(self, name: str) -> bool:
        with self._open(str(self._files[name]), framework="pt") as file:
            return bool(file.get_slice(name).get_dtype() == _BYTES)

    def _get(self, name: str, copy: bool) -> Tensor:
        path = str(self._files[name])
        with reading(f"tensor {name}", path), self._open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone() if copy else tensor  # memory of its own, or the file's while it lives


class ModelTensors(Tensors):
    """The tensors of a model, not copied, without the scales and zero points that decompressing leaves behind."""

    owner = "model"

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = without_leftovers(model.state_dict(keep_vars=True))
        super().__init__(self._tensors)
        check_one_device(self._tensors)

    @property
    def are_plain(self) -> bool:
        return all(tensor.dtype in FLOATS for tensor in self._tensors.values())

    def is_bytes(self, name: str) -> bool:
        return self._tensors[name].dtype == torch.uint8

    def _get(self, name: str, copy: bool) -> Tensor:
        tensor = self._tensors[name]
        setattr(tensor, KEEPS_ROWS, True)
        return tensor


class Checkpoint:
    """The parameters of a model by the names that transformers gives them; a subclass for each layout.

    ``settings`` is the ``quantization_config``; UnsupportedModelError if it asks for something that is not supported.
    """

    files: Tensors  # of the directory that was opened last, or of a model
    frequency_factors: Tensor | None = None  # [C/2], divisors of the rotary frequencies that the configuration gives
    stem = ""  # suffix of a linear layer's name in the name of its quantized weight
    modules: tuple[str, ...] = ()  # transformers classes that hold the tensors as files do; others repack them

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def read_from(self, tensors: Tensors) -> None:
        self.files = tensors

    def take_over(self, model: nn.Module) -> None:
        """Account for what loading a model has changed in it, other than repacking."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise, before any weight is read, if parameters of these shapes cannot be read."""
        if not any(self.is_packed(name.removesuffix(".weight")) for name, shape in shapes.items() if len(shape) == 2):
            method = self.settings.get("quant_method")
            raise ModelFileError(f"quantization_config says {method}, but no weight in the files is quantized so")

    def packed(self, module: str, shape: Sequence[int]) -> Tensor:
        """The packed weight [N, bytes] of a linear layer [N, D], or a stack of them, that is stored quantized."""
        raise NotImplementedError

    def is_packed(self, module: str) -> bool:
        return f"{module}{self.stem}" in self.files

    def __contains__(self, name: str) -> bool:
        return name in self.files or self.is_packed(name.removesuffix(".weight"))

    def parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Read a parameter of that shape: in ``dtype``, or packed, [N, bytes]. It is not kept."""
        module = name.removesuffix(".weight")
        if len(shape) > 1 and self.is_packed(module):
            return self.packed(module, shape)
        return self.files.read(name, shape).to(dtype)

    def unused(self) -> list[str]:
        """The names of tensors that were not read and would change the model; a bias of zeros would not."""
        names = [name for name in self.files.unused() if _IGNORED.search(name) is None]
        return [name for name in names if not (name.endswith(".bias") and not self.files.read(name, [None]).any())]


class PlainCheckpoint(Checkpoint):
    """Plain weights; each matrix is quantized to the format ``weights`` and freed before the next is read."""

    def __init__(self, weights: str) -> None:
        super().__init__({})
        self._weights = weights

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if len(shape) == 2:
                try:
                    named(self._format(name), shape[1])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

    def is_packed(self, module: str) -> bool:
        return False

    def parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if len(shape) != 2:
            return super().parameter(name, shape, dtype)
        # Rounded to `dtype` first, as a loaded model's weights are.
        return quantize(self.files.read(name, shape, copy=False).to(dtype), self._format(name))

    def _format(self, name: str) -> str:
        return outer_format(self._weights) if name in (EMBEDDING, HEAD) else self._weights


def without_quantization(config: Any) -> Any:
    """Copy a configuration without its ``quantization_config``."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
