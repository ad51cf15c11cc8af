"""Tiny checkpoints in the layouts of others, written here from the formats' public definitions, number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import numpy as np
import torch
from safetensors.torch import save_file

Stored = dict[str, torch.Tensor]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that the i-th nibble of a word holds


class Layout(NamedTuple):
    """A ``quantization_config``, and what writes the weight [N, D] of a linear layer: tensors, and what they mean."""

    settings: dict[str, Any]
    write: Callable[[str, torch.Tensor], tuple[Stored, torch.Tensor]]


def tiny(architecture: str = "llama2", **changes: Any) -> Any:
    """A model of transformers whose widths groups of 32 and 128 divide."""
    return helpers.tiny_model(architecture, **{**SIZES, **changes})


def write(directory: Path, model: Any, layout: Layout, **changes: Any) -> Any:
    """Write a checkpoint of a model, and give the model that has what its weights mean.

    ``changes`` go over its ``quantization_config``.
    """
    directory.mkdir()
    tensors: Stored = {}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if weight.dim() == 2 and "proj" in name:
            stored, meant = layout.write(module, weight.float())
            tensors |= stored
            weight.copy_(meant)
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = weight.clone()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] = {**layout.settings, **changes}
    path.write_text(json.dumps(content))
    helpers.tiny_tokenizer().save_pretrained(directory)
    return model


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers [A, B] in words [A, ceil(B · bits / 32)], the first in the lowest bits."""
    each = 32 // bits
    out = np.zeros((values.shape[0], -(-values.shape[1] // each)), dtype=np.uint32)
    for column in range(values.shape[1]):
        out[:, column // each] |= values[:, column].numpy().astype(np.uint32) << np.uint32(bits * (column % each))
    return torch.from_numpy(out.view(np.int32))


def rounded(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Unsigned values [N, D], scales and zero points [N, G], rounded to nearest, and what they mean [N, D]."""
    rows, width = weight.shape
    size = width if group == -1 else group
    parts, top = weight.reshape(rows, -1, size), (1 << bits) - 1
    if symmetric:
        zero = torch.full(parts.shape[:2], float(1 << (bits - 1)))
        scale = parts.abs().amax(2) / ((1 << (bits - 1)) - 1)
    else:
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round()
    scale = scale.half().float()
    values = ((parts / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    meant = (values - zero[..., None]) * scale[..., None]
    return values.reshape(rows, width).int(), scale, zero.int(), meant.reshape(rows, width)


def gptq(bits: int, group: int, symmetric: bool, version: str = "gptq", stored_less: int | None = None) -> Layout:
    """``stored_less``: what is taken off the zero points, if not what the version says."""
    less = stored_less if stored_less is not None else int(version == "gptq")
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False}

    def one(module: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        values, scale, zero, meant = rounded(weight, bits, group, symmetric)
        size = weight.shape[1] if group == -1 else group
        zeros = (zero.t() - less) & ((1 << bits) - 1)
        return {
            f"{module}.qweight": words(values, bits).t(),
            f"{module}.qzeros": words(zeros, bits),
            f"{module}.scales": scale.t().half(),
            f"{module}.g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // size,
            f"{module}.bias": torch.zeros(weight.shape[0], dtype=torch.float16),
        }, meant

    return Layout({**settings, "checkpoint_format": version}, one)


def awq(group: int) -> Layout:
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}

    def in_words(values: torch.Tensor) -> torch.Tensor:
        """[A, N] in words [A, N / 8]."""
        return words(values.reshape(len(values), -1, 8)[:, :, list(AWQ_ORDER)].reshape(values.shape), 4)

    def one(module: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        values, scale, zero, meant = rounded(weight, 4, group, symmetric=False)
        return {
            f"{module}.qweight": in_words(values.t()),
            f"{module}.qzeros": in_words(zero.t()),
            f"{module}.scales": scale.t().half(),
        }, meant

    return Layout(settings, one)


def compressed(form: str, bits: int, group: int | None, symmetric: bool = True, kind: str = "int") -> Layout:
    """``group`` None is one scale for each output."""
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "group_size": group or -1, "actorder": None}
    weights["strategy"] = "group" if group else "channel"
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group_0}}

    def one(module: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        values, scale, zero, meant = rounded(weight, bits, group or -1, symmetric)
        stored = {f"{module}.weight_scale": scale}
        if form == "int-quantized":
            stored[f"{module}.weight"] = (values - 128).to(torch.int8)
        else:
            stored[f"{module}.weight_packed"] = words(values, bits)
            stored[f"{module}.weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:  # along the outputs
            stored[f"{module}.weight_zero_point"] = words(zero.t(), bits).t()
        return stored, meant

    return Layout(settings, one)


def fine_grained() -> Layout:
    """The fp8 of transformers is compressed-tensors' in blocks under other names."""
    blocks = float8("block")

    def one(module: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        stored, meant = blocks.write(module, weight)
        stored[f"{module}.weight_scale_inv"] = stored.pop(f"{module}.weight_scale")
        return stored, meant

    return Layout({"quant_method": "fp8", "weight_block_size": [64, 128], "activation_scheme": "dynamic"}, one)


def float8(strategy: str) -> Layout:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [64, 128]
    activations = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group_0},
    }

    def one(module: str, weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        rows, width = weight.shape
        tall, wide = {"tensor": (rows, width), "channel": (1, width), "block": (64, 128)}[strategy]
        blocks = weight.reshape(rows // tall, tall, width // wide, wide)
        scale = blocks.abs().amax((1, 3)) / 448  # [rows / tall, width / wide]
        values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant = values.float() * scale[:, None, :, None]
        stored = scale.reshape(1) if strategy == "tensor" else scale
        flat = values.view(torch.uint8).reshape(rows, width).view(torch.float8_e4m3fn)
        return {f"{module}.weight": flat, f"{module}.weight_scale": stored}, meant.reshape(rows, width)

    return Layout(settings, one)
