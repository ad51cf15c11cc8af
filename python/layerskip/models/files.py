"""The files of a model: names of files and tensors, and checks whose errors name the file and its defect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from layerskip_kernels.formats import FORMATS

from .. import registry
from .._files import write_atomically
from .._imports import need

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYERS = "model.layers"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LEFTOVERS = ("weight_", "input_", "output_")  # prefixes of scales and zero points beside a weight

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


class ModelFileError(ValueError):
    """A file of a model is missing, truncated or corrupt."""


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Name what was being read; the readers raise anything from OSError to plain Exception on a corrupt file."""
    try:
        yield
    except Exception as error:
        raise ModelFileError(f"cannot read the {what} of {source}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def shards(directory: Path) -> list[Path]:
    """The files that hold a model's weights; ModelFileError where the index has none."""
    if not (directory / INDEX).is_file():
        return [directory / SINGLE]
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{directory / INDEX} has no weight_map")
    return [directory / shard for shard in sorted(set(weight_map.values()))]


def check_safetensors(path: Path) -> None:
    """Opening compares the header with the length of the file."""
    safetensors = need("safetensors", "reading weights")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
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
    source: str | Path, file: Path, what: str, find: Callable[[str], Path | None], make: Callable[..., Any]
) -> Any:
    """Read what `save_tensors` wrote to ``file``, or what ``find`` knows under the name ``source``.

    Returns ``make(metadata, tensors)``. FileNotFoundError or ValueError, with the path, if missing or not ``what``.
    """
    safetensors = need("safetensors", f"reading {what}")
    named = isinstance(source, str) and "/" not in source
    path = (find(str(source)) if named else None) or file
    if not path.is_file():
        hint = f"; {registry.hint(registry.MODELS, str(source))}" if named else ""
        raise FileNotFoundError(f"no {what.partition(' ')[2]} at {path}{hint}")
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            return make(opened.metadata() or {}, tensors)
    except KeyError as error:
        raise ValueError(f"{path} is not {what}: it has no {error}") from error
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not {what}: {error}") from error


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
