"""Read checkpoints: tensors of safetensors files or of loaded models, and a model built of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from layerskip_kernels.formats import kind_of, named, quantize

from ..._imports import need
from ..architectures import ARCHITECTURES, EMBEDDING, FLOATS, HEAD, assemble, check_names, layers_of, without_leftovers
from ..files import ModelFileError, check_safetensors, shards
from ..hf_checks import UnsupportedModelError, unsupported
from ..layers import shared
from ..model import LayerSkipModel
from ..quantize import outer_format
from ..rotary import exact_module

if TYPE_CHECKING:
    from torch import nn


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


Progress = Callable[[int, int], None]
"""Called after each weight with how many are done, and of how many."""


def build(
    source: str,
    config: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    generation_config: Any = None,
    progress: Progress | None = None,
) -> LayerSkipModel:
    """Read the parameters one by one.

    Parameters
    ----------
    source : str
        For messages.
    config : transformers.PreTrainedConfig
        Of a supported architecture. The model gets a copy without ``quantization_config``.
    checkpoint : Checkpoint
    dtype : torch.dtype
        Of what is not packed, and of the states.
    generation_config : transformers.GenerationConfig, optional
    progress : callable, optional

    Returns
    -------
    LayerSkipModel

    Raises
    ------
    ModelFileError
        If the checkpoint lacks a weight, has one too many, or one of another shape.
    """
    skeleton = _skeleton(without_quantization(config))
    config = skeleton.config
    named = dict(skeleton.named_parameters(remove_duplicate=False))
    check_names(named, ARCHITECTURES[config.model_type])
    tied = named[HEAD] is named[EMBEDDING]
    shapes = {name: tuple(weight.shape) for name, weight in named.items() if not (tied and name == HEAD)}
    held = _read(source, shapes, checkpoint, dtype, progress)
    held[EMBEDDING] = shared(held[EMBEDDING])  # one parameter, so that a tied head stays it on another device, too
    unused = [name for name in checkpoint.unused() if not (tied and name == HEAD)]
    if unused:
        raise ModelFileError(f"{source} has {len(unused)} weights that its config.json does not use, first {unused[0]}")
    for number, layer in enumerate(layers_of(config, held)):
        _check_alike(number, layer, config.hidden_size)
    decoder, head = assemble(skeleton, held, checkpoint.frequency_factors)
    generation_config = generation_config or skeleton.generation_config
    return LayerSkipModel(held[EMBEDDING], decoder, head, config, generation_config).eval()


def frequency_factors(model: LayerSkipModel) -> Tensor | None:
    """What divides the frequencies that a model's configuration gives, [C/2]; None where they are the model's."""
    config = without_quantization(model.config)
    form = ARCHITECTURES[config.model_type].form(config, exact_module(_skeleton(config)))
    expected, held = form.rotaries[0].inv_freq, model.decoder.inv_freq
    factors = torch.where(expected == held, 1.0, expected / held)  # some are 0 in both
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5, atol=0) else factors


def without_quantization(config: Any) -> Any:
    """A copy that says nothing of how a checkpoint was quantized."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _skeleton(config: Any) -> Any:
    """A model of transformers without memory, for names and shapes, and the module of the rotary embedding."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _read(
    source: str, shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint, dtype: torch.dtype,
    progress: Progress | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The parameters of these names and shapes, packed or in ``dtype``."""
    checkpoint.check(shapes)
    missing = [name for name in shapes if name not in checkpoint]
    if missing:
        raise ModelFileError(f"{source} lacks {len(missing)} weights that its config.json asks for, first {missing[0]}")
    held = {}
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        held[name] = checkpoint.parameter(name, shape, dtype)
        if progress is not None:
            progress(number, len(shapes))
    return held


def _check_alike(number: int, layer: dict[str, Tensor], width: int) -> None:
    """Matrices that one packing of the states serves are of one kind."""
    for names in (("q", "k", "v"), ("gate", "up")):
        kinds = {name: kind_of(layer[name], width) for name in names if name in layer}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise unsupported(f"layer {number} with {found}", "q, k and v of one kind, and gate and up")
