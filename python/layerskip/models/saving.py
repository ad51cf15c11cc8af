"""Writing a model with packed weights as a directory that loads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from layerskip_kernels.formats import FORMATS, is_interleaved, rows_of

from .._extras import need
from .checkpoints import ROPE_FACTORS, frequency_factors, own_settings, without_quantization
from .files import INDEX, SINGLE
from .model import LayerSkipModel
from .named import named_weights
from .quantized import with_widths

SHARD_BYTES = 5_000_000_000


def save(model: LayerSkipModel, directory: Path, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write safetensors, configuration and tokenizer; `layerskip.load` reads them, and keeps packed what is packed.

    Parameters
    ----------
    model : LayerSkipModel
        Without an exit of its own: that is kept in its own file.
    directory : Path
        That is there.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    shard_bytes : int
        The most that one file of weights holds, but for a weight that is larger.
    """
    write = need("safetensors.torch", "saving a model").save_file
    tensors = dict(named_weights(model))
    packed = [name for name in model.weights.split("+") if name in FORMATS]
    factors = frequency_factors(model) if packed else None
    if factors is not None:
        tensors[ROPE_FACTORS] = factors
    files = _shards(tensors, shard_bytes)
    widths = {id(weight): width for weight, width in with_widths(model)}

    def rows(weight: Tensor) -> Tensor:
        """As any other reader expects it, whatever order it has in memory."""
        return rows_of(weight, widths[id(weight)]) if is_interleaved(weight) else weight

    for name, held in files.items():
        write(
            {key: rows(tensors[key]).detach().contiguous() for key in held}, directory / name, metadata={"format": "pt"}
        )
    if len(files) > 1:
        weight_map = {key: name for name, held in files.items() for key in held}
        size = sum(tensor.nbytes for tensor in tensors.values())
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")
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
    """File names, each with the tensors that it holds, in order."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": held for number, held in enumerate(parts, start=1)}
