"""Load models and tokenizers, and save models with packed weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.formats import FORMATS, is_interleaved, rows_of

from .. import registry
from .._autograd_modes import keeps_grad_mode
from .._imports import need
from . import files
from .adaptation import adapt, build, frequency_factors
from .architectures import ARCHITECTURES, check_config, check_model_type, named_weights
from .checkpoints.base import PlainCheckpoint, Progress, TensorFiles, without_quantization
from .checkpoints.gguf import SUFFIX, GgufCheckpoint, check_architecture
from .checkpoints.hf import ROPE_FACTORS, checkpoint_of, layout_of, method_of, own_settings
from .files import ModelFileError, check_fields, check_names, check_safetensors, read_json, reading, shards
from .model import LayerSkipModel

NATIVE = "native"
"""The weights as they are in a model's own file."""
GENERATION_CONFIG = "generation_config.json"
_JSON_FILES: dict[str, files.Fields] = {
    "config.json": files.CONFIG, GENERATION_CONFIG: files.GENERATION, files.INDEX: {}, "tokenizer.json": {},
    "tokenizer_config.json": {},
}  # fmt: skip
"""The files that are checked before transformers reads them, with the fields that are read."""


@keeps_grad_mode
def load(
    name_or_dir: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name_or_dir : str or path
        Name that an installed package provides (`layerskip.registry`), directory as written by ``save_pretrained`` or
        ``layerskip quantize``, GGUF file, or ``owner/name`` on the Hugging Face hub. A `Path`, whatever exists, and
        whatever looks like a path is only looked for on the disk.
    dtype : torch.dtype
        Of plain weights and of states.
    weights : str, optional
        Quantize plain weights: one of `layerskip_kernels.formats.FORMATS`. "native": as in the file that a package
        provides, which may be quantized. By default a directory's weights as they are.
    progress : callable, optional
        Called after each packed weight with the number of weights done, and of all.

    Returns
    -------
    (transformers.PreTrainedModel or LayerSkipModel, transformers.PreTrainedTokenizerBase)
        The model in evaluation mode; a `LayerSkipModel` if weights are packed, which are never expanded.

    Raises
    ------
    ValueError, ModuleNotFoundError
        For an unknown name (the message has similar ones, or how to install the package), an unknown format, or
        weights that are quantized already.
    FileNotFoundError
        If the directory or one of its files does not exist.
    ModelFileError
        If a file is truncated, corrupt, or lacks what the configuration promises.
    UnsupportedModelError
        If the architecture or the quantization is not supported; raised before any weight is read.
    """
    check_weights(weights)
    if isinstance(name_or_dir, str):
        provider = registry.find(registry.MODELS, name_or_dir)
        if provider is not None:
            return _provided(provider, name_or_dir, dtype, weights, progress)
        # The hub's few models without an owner are of no architecture that is supported.
        if not registry.is_path(name_or_dir) and "/" not in name_or_dir:
            raise registry.unknown(registry.MODELS, name_or_dir)
    return _read(name_or_dir, dtype, None if weights == NATIVE else weights, progress)


def check_weights(weights: str | None) -> None:
    """Raise ValueError for the name of an unknown format."""
    if weights is not None and weights != NATIVE and weights not in FORMATS:
        raise ValueError(f"unknown weights {weights!r}, expected one of {', '.join((*FORMATS, NATIVE))}")


def _provided(
    provider: Any, name: str, dtype: torch.dtype, weights: str | None, progress: Progress | None
) -> tuple[Any, Any]:
    if weights == NATIVE:
        path = getattr(provider, "native", lambda name: None)(name)
        if path is None:
            raise ValueError(f"{name} comes in no file of quantized weights; weights may be {', '.join(FORMATS)}")
        return _read(path, dtype, None, progress)
    model, tokenizer = provider.load(name, dtype)
    if weights is not None:
        model = adapt(model).quantize(weights, release=True, progress=progress)
    return model, tokenizer


def _read(
    name_or_dir: str | os.PathLike[str], dtype: torch.dtype, weights: str | None, progress: Progress | None
) -> tuple[Any, Any]:
    transformers = need("transformers", "loading models")
    source, options = str(name_or_dir), {}
    if registry.is_path(name_or_dir):
        path = Path(source).expanduser()
        if path.suffix == SUFFIX and path.is_file():
            return _read_gguf(path, dtype, weights, progress)
        source, options = str(path), {"local_files_only": True}
        _check_directory(path)
    with reading("configuration", source):
        config = transformers.AutoConfig.from_pretrained(source, **options)
    check_model_type(config.model_type)
    check_fields(f"the configuration of {source}", config.to_dict(), files.CONFIG, files.REQUIRED)
    checkpoint = _checkpoint(source, config, weights)
    check_config(config if checkpoint is None else without_quantization(config))
    with reading("tokenizer", source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if checkpoint is not None:
        directory, generation = Path(source), None
        if not options:
            with reading("weights", source):
                hub = need("huggingface_hub", "loading models from the hub")
                directory = Path(hub.snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
        checkpoint.read_from(TensorFiles(directory))
        if (directory / GENERATION_CONFIG).is_file():
            read_json(directory / GENERATION_CONFIG, files.GENERATION)
            with reading("generation configuration", str(directory)):
                generation = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
        return build(source, config, checkpoint, dtype, generation, progress), tokenizer
    with reading("weights", source):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_keys(source, info)
    if model.generation_config is not None:
        generation = model.generation_config.to_dict()
        check_fields(f"the generation configuration of {source}", generation, files.GENERATION)
    if weights is not None:
        return adapt(model.eval()).quantize(weights, release=True, progress=progress), tokenizer
    return model.eval(), tokenizer


def _checkpoint(source: str, config: Any, weights: str | None) -> Any:
    """The reader of weights that are quantized, or that are packed as they are read; None: transformers reads them."""
    method = method_of(config)
    if method is None:
        architecture = ARCHITECTURES.get(config.model_type)
        # Files have each expert's matrices, and transformers stacks them.
        has_experts = architecture is not None and "experts_in" in architecture.layer_paths
        return None if weights is None or has_experts else PlainCheckpoint(weights)
    layout_of(method)
    if weights is not None:
        raise ValueError(f"the weights of {source} are quantized already ({method}); leave out {weights}")
    return checkpoint_of(config)


def _read_gguf(
    path: Path, dtype: torch.dtype, weights: str | None, progress: Progress | None
) -> tuple[LayerSkipModel, Any]:
    """Configuration and tokenizer through transformers, the weights as they are."""
    transformers = need("transformers", "loading models")
    if weights is not None:
        raise ValueError(f"{path} has weights of its own format; leave out {weights}")
    given = {"gguf_file": path.name, "local_files_only": True}
    checkpoint = GgufCheckpoint(path)
    with checkpoint.shared(), reading("configuration", str(path)):
        config = transformers.AutoConfig.from_pretrained(path.parent, **given)
    check_fields(path, config.to_dict(), files.CONFIG, files.REQUIRED)
    check_config(config)
    check_architecture(path, config.model_type)
    with checkpoint.shared(), reading("tokenizer", str(path)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **given)
    return build(str(path), config, checkpoint, dtype, progress=progress), tokenizer


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise FileNotFoundError(f"no such directory: {directory}")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, expected the directory of a model, or a GGUF")
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json, so it is not the directory of a model")
    contents: dict[str, Mapping[str, Any]] = {
        name: read_json(directory / name, fields)
        for name, fields in _JSON_FILES.items()
        if (directory / name).is_file()
    }
    check_model_type(contents["config.json"].get("model_type"))
    for shard in shards(directory):
        check_safetensors(shard)


def _check_keys(source: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint with missing or superfluous weights, which transformers fills in or ignores."""
    for entry in info["mismatched_keys"]:
        if isinstance(entry, str):  # transformers 4.57 gives no shapes
            raise ModelFileError(f"{source} has {entry} of another shape than its config.json asks for")
        name, found, expected = entry
        raise ModelFileError(f"{source} has {name} of shape {list(found)}, its config.json asks for {list(expected)}")
    unused = sorted(key for key in info["unexpected_keys"] if "layers." in key)
    check_names(source, sorted(info["missing_keys"]), unused)


SHARD_BYTES = 5_000_000_000


def save(model: LayerSkipModel, directory: Path, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors, configuration and tokenizer for `layerskip.load`; packed weights stay packed.

    Parameters
    ----------
    model : LayerSkipModel
        An exit is not written.
    directory : Path
        Must exist.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    shard_bytes : int
        Limit of a file of weights.
    """
    write = need("safetensors.torch", "saving a model").save_file
    tensors = dict(named_weights(model))
    packed = [name for name in model.weights.split("+") if name in FORMATS]
    factors = frequency_factors(model) if packed else None
    if factors is not None:
        tensors[ROPE_FACTORS] = factors
    written = _shards(tensors, shard_bytes)
    widths = {id(weight): width for weight, width in model.matrices()}

    def rows(weight: Tensor) -> Tensor:
        """The weight with its rows in order, as other readers expect it."""
        return rows_of(weight, widths[id(weight)]) if is_interleaved(weight) else weight

    for name, held in written.items():
        write(
            {key: rows(tensors[key]).detach().contiguous() for key in held}, directory / name, metadata={"format": "pt"}
        )
    if len(written) > 1:
        weight_map = {key: name for name, held in written.items() for key in held}
        size = sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / files.INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")
    config = without_quantization(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    if packed:
        config.quantization_config = own_settings(packed)
    config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _shards(tensors: dict[str, Tensor], limit: int) -> dict[str, list[str]]:
    """The names of files, each with the names of its tensors."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    if len(parts) == 1:
        return {files.SINGLE: parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": held for number, held in enumerate(parts, start=1)}
