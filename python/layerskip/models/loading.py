"""Loading a model and its tokenizer, with errors that name the file and what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import registry
from .._extras import need
from .architectures import check_config, check_model_type

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_JSON_FILES = ("config.json", "generation_config.json", _INDEX, "tokenizer.json", "tokenizer_config.json")


class ModelFileError(ValueError):
    """A file of a model is missing, truncated or corrupt."""


def load(name_or_dir: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name_or_dir : str or path
        A name that an installed package provides (`layerskip.registry`), a directory as ``save_pretrained`` writes it,
        or ``owner/name`` on the Hugging Face hub. What exists, is a `Path`, or looks like a path is taken from the disk
        alone.
    dtype : torch.dtype

    Returns
    -------
    (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
        The model in evaluation mode.

    Raises
    ------
    ValueError, ModuleNotFoundError
        For a name that is neither a directory nor on the hub nor provided by a package; the message names those near
        it, or how to install what would provide it.
    FileNotFoundError
        If the directory or a file that it must hold does not exist.
    ModelFileError
        If a file is truncated, corrupt, or does not hold what the configuration promises.
    UnsupportedModelError
        If the architecture is not supported; found before any weight is read.
    """
    if isinstance(name_or_dir, str):
        provider = registry.find(registry.MODELS, name_or_dir)
        if provider is not None:
            model, tokenizer = provider.load(name_or_dir, dtype)
            return model, tokenizer
        # The hub's few models without an owner are of no architecture that is supported.
        if not registry.is_path(name_or_dir) and "/" not in name_or_dir:
            raise registry.unknown(registry.MODELS, name_or_dir)
    return _read(name_or_dir, dtype)


def _read(name_or_dir: str | os.PathLike[str], dtype: torch.dtype) -> tuple[Any, Any]:
    """From a directory or the hub."""
    transformers = need("transformers", "loading models")
    source, options = str(name_or_dir), {}
    if registry.is_path(name_or_dir):
        source, options = str(Path(name_or_dir).expanduser()), {"local_files_only": True}
        _check_directory(Path(source))
    with _reading("configuration", source):
        config = transformers.AutoConfig.from_pretrained(source, **options)
    check_config(config)
    with _reading("tokenizer", source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    with _reading("weights", source):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_keys(source, info)
    return model.eval(), tokenizer


@contextmanager
def _reading(what: str, source: str) -> Iterator[None]:
    """Name what was being read; the readers raise anything from OSError to plain Exception on a corrupt file."""
    try:
        yield
    except Exception as error:
        raise ModelFileError(f"cannot read the {what} of {source}: {error}") from error


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise FileNotFoundError(f"no such directory: {directory}")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, expected the directory of a model")
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json, so it is not the directory of a model")
    contents = {name: _read_json(directory / name) for name in _JSON_FILES if (directory / name).is_file()}
    check_model_type(contents["config.json"].get("model_type"))
    weight_map = contents.get(_INDEX, {"weight_map": {"": _SINGLE}}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{directory / _INDEX} has no weight_map")
    for shard in sorted(set(weight_map.values())):
        _check_safetensors(directory / shard)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _check_safetensors(path: Path) -> None:
    """Opening compares the header with the length of the file."""
    safetensors = need("safetensors", "reading weights")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safetensors.safe_open(str(path), framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{path} is truncated or corrupt ({path.stat().st_size} bytes): {error}") from error


def _check_keys(source: str, info: dict[str, Any]) -> None:
    """Transformers fills what a checkpoint lacks with random numbers, and ignores what it has too many of."""
    for entry in info["mismatched_keys"]:
        if isinstance(entry, str):  # transformers 4.57 gives no shapes
            raise ModelFileError(f"{source} has {entry} of another shape than its config.json asks for")
        name, found, expected = entry
        raise ModelFileError(f"{source} has {name} of shape {list(found)}, its config.json asks for {list(expected)}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelFileError(f"{source} lacks {len(missing)} weights that its config.json asks for, first {missing[0]}")
    unused = sorted(key for key in info["unexpected_keys"] if "layers." in key)
    if unused:
        raise ModelFileError(f"{source} has {len(unused)} weights that its config.json does not use, first {unused[0]}")
