"""GGUF files of llama.cpp: Q8_0, Q4_0 and Q4_1 are packed weights byte for byte, other types become int8."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerskip_kernels.formats import FORMATS, quantize

from ..._imports import need
from ..files import Field, ModelFileError, check_fields, reading
from ..hf_checks import UnsupportedModelError, unsupported
from .base import Checkpoint

SUFFIX = ".gguf"
FORMAT_OF = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4_zero"}
PLAIN = ("F32", "F16", "BF16")
OTHERWISE = "int8"  # the format of other quantized types
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""The values of ``model_type`` whose GGUF files have transformers' weights, in its order or in Llama's."""
# Architectures whose q and k rows llama.cpp keeps in the order of its own rotary embedding.
_PERMUTED = ("llama", "mistral")
_ROWS = 4096  # dequantized at a time
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"
_SHARING = Lock()
_ARCHITECTURE, _HEADS = "general.architecture", {"q_proj": "head_count", "k_proj": "head_count_kv"}


def check_architecture(path: Path, model_type: str) -> None:
    """Raise UnsupportedModelError for other architectures: Gemma's norms, for one, are stored in another way."""
    if model_type not in ARCHITECTURES:
        raise unsupported(f"{path}, a GGUF file of model_type {model_type!r},", f"GGUF of {', '.join(ARCHITECTURES)}")


def gguf_name(name: str) -> str:
    """The name of a parameter in a GGUF file."""
    stem, _, kind = name.rpartition(".")
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
    if layer is None:
        return f"{_NAMES.get(stem, stem)}.{kind}"
    return f"blk.{layer[1]}.{_NAMES.get(layer[2], layer[2])}.{kind}"


def _reader(gguf: Any, path: Path) -> Any:
    """A ``gguf.GGUFReader``, which slices its `numpy.memmap` for every token: a plain array is four times as fast."""

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)

    return Reader(str(path))


class GgufCheckpoint(Checkpoint):
    """A GGUF file; ModelFileError if it is none."""

    def __init__(self, path: Path) -> None:
        self._gguf = need("gguf", f"reading {path.name}")
        with reading("tensors", str(path)):
            reader = _reader(self._gguf, path)
        self._path, self._reader = path, reader
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        self._used: set[str] = set()

        def value_of(name: str, field: Field, required: Collection[str] = ()) -> Any:
            with reading(f"field {name}", str(path)):
                found = {name: reader.fields[name].contents()} if name in reader.fields else {}
            check_fields(path, found, {name: field}, required)
            return found.get(name)

        architecture = value_of(_ARCHITECTURE, Field(str), required=(_ARCHITECTURE,))
        counts = _HEADS.items() if architecture in _PERMUTED else ()
        heads = {name: value_of(f"{architecture}.attention.{count}", Field(int, 1, 2**16)) for name, count in counts}
        self._heads = {name: int(count) for name, count in heads.items() if count is not None}
        factors = self._tensors.get(_ROPE_FACTORS)
        self.frequency_factors = None if factors is None else torch.from_numpy(np.array(factors.data))
        self._used.add(_ROPE_FACTORS)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within, transformers gets this reader: it would parse the file for the configuration and the tokenizer.

        Both are public only as ``from_pretrained(gguf_file=…)``, which takes a path and calls ``gguf.GGUFReader``.
        """
        with _SHARING:
            opening = self._gguf.GGUFReader
            self._gguf.GGUFReader = self._opened
            try:
                yield
            finally:
                self._gguf.GGUFReader = opening

    def _opened(self, path: str | os.PathLike[str], *args: Any) -> Any:
        return self._reader if self._path.samefile(path) and not args else type(self._reader)(path, *args)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in shapes:
            if name in self:
                self._check_type(self._tensors[gguf_name(name)])

    def __contains__(self, name: str) -> bool:
        return gguf_name(name) in self._tensors

    def unused(self) -> list[str]:
        return sorted(self._tensors.keys() - self._used)

    def parameter(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = self._tensors[gguf_name(name)]
        self._used.add(tensor.name)
        found = [int(size) for size in reversed(tensor.shape)]
        if found != list(shape):
            raise ModelFileError(f"{tensor.name} has shape {found}, the configuration asks for {list(shape)}")
        kind = tensor.tensor_type.name
        if kind in FORMAT_OF and len(shape) == 2:
            weight = torch.from_numpy(np.array(tensor.data)).view(torch.uint8)
            assert weight.shape[1] == FORMATS[FORMAT_OF[kind]].row_bytes(shape[1])
        elif kind in PLAIN or len(shape) < 2:
            weight = self._floats(tensor.data, tensor.tensor_type).to(dtype).view(*shape)
        else:
            parts = [tensor.data[first : first + _ROWS] for first in range(0, shape[0], _ROWS)]  # views of the file
            weight = torch.cat([quantize(self._floats(part, tensor.tensor_type), OTHERWISE) for part in parts])
        return self._in_order(name, weight)

    def _floats(self, data: Any, kind: Any) -> Tensor:
        return torch.from_numpy(np.array(self._gguf.quants.dequantize(data, kind)))

    def _in_order(self, name: str, weight: Tensor) -> Tensor:
        """The rows of q and k as transformers has them: pairs (i, i + C/2), which llama.cpp keeps side by side."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return weight
        if weight.shape[0] % (2 * heads):
            raise ModelFileError(f"{name} has {weight.shape[0]} rows, no even number for each of {heads} heads")
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape).contiguous()

    def _check_type(self, tensor: Any) -> None:
        kind = tensor.tensor_type
        if kind.name in (*FORMAT_OF, *PLAIN):
            return
        try:
            self._gguf.quants.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            known = ", ".join((*FORMAT_OF, *PLAIN))
            raise unsupported(f"{tensor.name} of type {kind.name}", f"{known}, and what gguf dequantizes") from None
        width = int(tensor.shape[0])
        if width % FORMATS[OTHERWISE].group_size:
            raise UnsupportedModelError(
                f"{tensor.name} of type {kind.name} has rows of {width} weights, no multiple of 32"
            )
