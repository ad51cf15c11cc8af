"""The files of a model: names of files and tensors, and checks whose errors name the file and its defect."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from layerskip_kernels.formats import FORMATS

from .. import registry
from .._files import write_atomically
from .._imports import need, printable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYERS = "model.layers"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LEFTOVERS = ("weight_", "input_", "output_")  # prefixes of scales and zero points beside a weight

AnyTensor = TypeVar("AnyTensor", bound=Tensor)
Made = TypeVar("Made")


class ModelFileError(ValueError):
    """A file of a model is missing, truncated or corrupt, or a field of it has a wrong value."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Name what was being read; the readers raise anything from OSError to plain Exception on a corrupt file."""
    try:
        yield
    except Exception as error:
        raise ModelFileError(f"cannot read the {what} of {source}: {error}") from error


class Field(NamedTuple):
    """What a field of a file may hold: a value of ``kind``, within bounds if it is a number; also null, or nothing."""

    kind: type  # bool, int, float (or an integer) or str
    minimum: float = -math.inf
    maximum: float = math.inf
    many: bool = False  # a list of such values, too

    def admits(self, value: object) -> bool:
        if self.many and isinstance(value, list):
            return all(map(self._replace(many=False).admits, value))
        if self.kind not in (int, float):
            return isinstance(value, self.kind)
        kind = Integral if self.kind is int else Real  # numpy's, too
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        number: Any = value
        return bool(-math.inf < number < math.inf and self.minimum <= number <= self.maximum)

    def __str__(self) -> str:
        text = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[self.kind]
        if self.minimum > -math.inf:
            text += f" in {self.minimum} … {self.maximum}"
        return text + (", or a list of them" if self.many else "")


Fields = Mapping[str, "Field | Fields"]
"""The fields of an object that are read, by name, or "*" for any name; mappings are objects in it."""


def check_fields(source: object, content: Mapping[str, Any], fields: Fields, required: Collection[str] = ()) -> None:
    """Check the fields of ``content``, which was read from ``source``; others are not read.

    ModelFileError, with source, field and value, for a wrong type or range, or for one of ``required`` that is missing.
    """
    every = fields.get("*")
    for name, expected in fields.items() if every is None else dict.fromkeys(content, every).items():
        value = content.get(name)
        if value is None:
            if name in required:
                raise ModelFileError(f"{source}: {name} is missing")
        elif isinstance(expected, Field):
            if not expected.admits(value):
                raise ModelFileError(f"{source}: {name} is {shortened(value)}, expected {expected}")
        elif isinstance(value, Mapping):
            check_fields(f"{source}: {name}", value, expected)
        else:
            raise ModelFileError(f"{source}: {name} is {shortened(value)}, expected an object")


def shortened(value: object) -> str:
    """The beginning of a value's representation."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


_SIZE, _TOKEN, _SCALE = Field(int, 1, 2**24), Field(int, 0, 2**24), Field(float, 1e-9, 1e9)
_ROPE: Fields = {
    "rope_type": Field(str), "type": Field(str), "rope_theta": Field(float, 1, 1e30), "factor": _SCALE,
    "partial_rotary_factor": Field(float, 1e-3, 1), "original_max_position_embeddings": Field(int, 1, 2**40),
    "attention_factor": Field(float, 0, 1e9), "beta_fast": _SCALE, "beta_slow": _SCALE, "low_freq_factor": _SCALE,
    "high_freq_factor": _SCALE, "mscale": Field(float, 0, 1e9), "mscale_all_dim": Field(float, 0, 1e9),
    "short_factor": _SCALE._replace(many=True), "long_factor": _SCALE._replace(many=True), "truncate": Field(bool),
}  # fmt: skip
_BY_LAYER_TYPE = {**_ROPE, "full_attention": _ROPE, "sliding_attention": _ROPE}
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
REQUIRED = (*SIZES, "num_hidden_layers", "rms_norm_eps")
CONFIG: Fields = {
    "model_type": Field(str), "num_hidden_layers": Field(int, 1, 10_000), "rms_norm_eps": Field(float, 0, 1),
    **dict.fromkeys(SIZES, _SIZE), "num_key_value_heads": _SIZE, "head_dim": Field(int, 1, 2**16),
    "max_position_embeddings": Field(int, 1, 2**40), "sliding_window": Field(int, 1, 2**40),
    "layer_types": Field(str, many=True), "tie_word_embeddings": Field(bool), "hidden_act": Field(str),
    "hidden_activation": Field(str), "rope_parameters": _BY_LAYER_TYPE, "rope_scaling": _BY_LAYER_TYPE,
    **{name: _ROPE[name] for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")},
    "no_rope_layers": Field(int, 0, 1, many=True), "residual_multiplier": Field(float, -1e9, 1e9),
    "attention_multiplier": Field(float, -1e9, 1e9), "embedding_multiplier": Field(float, -1e9, 1e9),
    "logits_scaling": _SCALE, "query_pre_attn_scalar": _SCALE, "num_experts_per_tok": _SIZE,
    "num_local_experts": _SIZE, "num_experts": _SIZE, "moe_intermediate_size": _SIZE, "norm_topk_prob": Field(bool),
    "mlp_only_layers": Field(int, 0, 10_000, many=True), "decoder_sparse_step": Field(int, 1, 10_000),
    "bos_token_id": _TOKEN._replace(many=True), "eos_token_id": _TOKEN._replace(many=True),
    "pad_token_id": Field(int, -1, 2**24), "quantization_config": {"quant_method": Field(str)},
}  # fmt: skip
"""The fields of a config.json that loading and decoding read."""
GENERATION: Fields = {
    "bos_token_id": _TOKEN._replace(many=True), "eos_token_id": _TOKEN._replace(many=True),
    "pad_token_id": Field(int, -1, 2**24), "do_sample": Field(bool), "temperature": Field(float, 0, 1e9),
    "top_k": Field(int, 0, 2**31), "top_p": Field(float, 0, 1), "min_p": Field(float, 0, 1),
    "repetition_penalty": _SCALE, "max_length": Field(int, 0, 2**40), "max_new_tokens": Field(int, 0, 2**40),
}  # fmt: skip
"""The fields of a generation_config.json that decoding reads."""


def read_json(path: Path, fields: Fields | None = None) -> dict[str, Any]:
    """An object in a JSON file, with checked ``fields``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8; lists in lists in lists
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}, expected an object")
    check_fields(path, content, fields or {})
    return content


def shards(directory: Path) -> list[Path]:
    """The files that hold a model's weights; ModelFileError if the index names none, or files elsewhere."""
    index = directory / INDEX
    if not index.is_file():
        return [directory / SINGLE]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise ModelFileError(
                f"{index}: weight_map[{tensor!r}] is {shortened(name)}, expected the name of a file in {directory}"
            )
    return [directory / shard for shard in sorted(set(weight_map.values()))]


def check_names(source: str, missing: Sequence[str], unused: Sequence[str]) -> None:
    """Raise ModelFileError if weights that the configuration asks for are missing, or others are there."""
    if missing:
        raise ModelFileError(f"{source} lacks {len(missing)} weights that its config.json asks for, first {missing[0]}")
    if unused:
        raise ModelFileError(f"{source} has {len(unused)} weights that its config.json does not use, first {unused[0]}")


def check_safetensors(path: Path) -> None:
    """Opening compares the header with the length of the file."""
    safetensors = need("safetensors", "reading weights")
    if not path.is_file():
        raise FileNotFoundError(printable(f"{path} is missing"))
    try:
        with safetensors.safe_open(str(path), framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{path} is truncated or corrupt ({path.stat().st_size} bytes): {error}") from error


def save_tensors(path: Path, what: str, tensors: Mapping[str, Tensor | None], metadata: Mapping[str, Any]) -> Path:
    """Write ``what``, "an exit" say, to a safetensors file, atomically; tensors that are None are left out."""
    data = need("safetensors.torch", f"saving {what}").save(
        # Clones, because safetensors refuses tensors that share their storage.
        {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if tensor is not None},
        metadata={name: str(value) for name, value in metadata.items()},
    )
    write_atomically(path, data)
    return path


def load_tensors(
    source: str | Path, file: Path, what: str, find: Callable[[str], Path | None], make: Callable[..., Made]
) -> Made:
    """Read what `save_tensors` wrote to ``file``, or what ``find`` knows under the name ``source``.

    Returns ``make(metadata, tensors)``. FileNotFoundError or ValueError, with the path, if missing or not ``what``.
    """
    safetensors = need("safetensors", f"reading {what}")
    named = isinstance(source, str) and "/" not in source
    path = (find(str(source)) if named else None) or file
    if not path.is_file():
        hint = f"; {registry.hint(registry.MODELS, str(source))}" if named else ""
        raise FileNotFoundError(printable(f"no {what.partition(' ')[2]} at {path}{hint}"))
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            return make(opened.metadata() or {}, tensors)
    except KeyError as error:
        raise ModelFileError(f"{path} is not {what}: it has no {error}") from error
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ModelFileError(f"{path} is not {what}: {error}") from error


def metadata_integer(metadata: Mapping[str, str], name: str) -> int:
    """A number of at most nine digits in the metadata of a safetensors file; KeyError or ValueError."""
    if re.fullmatch("[0-9]{1,9}", metadata[name]) is None:
        raise ValueError(f"{name} is {shortened(metadata[name])}, expected an integer in 0 … 999999999")
    return int(metadata[name])


def digest_of_weights(model: nn.Module) -> str:
    """Digest of the bytes, dtype and shape of every parameter, computed by several threads."""

    def digest(weight: Tensor) -> str:
        data = weight.detach().flatten().cpu().contiguous().view(torch.uint8).numpy().data
        return f"{weight.dtype} {tuple(weight.shape)} {hashlib.sha256(data).hexdigest()}"

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256("\n".join(pool.map(digest, model.parameters())).encode()).hexdigest()


def outer_format(weights: str) -> str:
    """The format of embedding and head beside layers in ``weights``: with four bits they would lose most of all."""
    return "int8" if FORMATS[weights].bits == 4 else weights


def without_leftovers(tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Drop what decompressing leaves behind: scales and zero points of weights that are plain now."""
    plain = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dtype in FLOATS}

    def is_leftover(name: str) -> bool:
        module, _, own = name.rpartition(".")
        return own.startswith(_LEFTOVERS) and f"{module}.weight" in plain

    return {name: tensor for name, tensor in tensors.items() if not is_leftover(name)}
