"""The ``quant_method`` "layerskip" in transformers: ``from_pretrained`` loads what ``layerskip quantize`` wrote.

Every process that has this library and transformers' quantizers imports it, so the library's models are imported only
when such a directory is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._imports import need
from ..registry import METHOD


class LayerSkipConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a directory that ``layerskip quantize`` wrote."""

    def __init__(self, version: int = 0, formats: Sequence[str] = (), quant_method: Any = METHOD) -> None:
        from ..models.checkpoints.hf import SETTINGS, OwnCheckpoint
        from ..models.files import check_fields

        settings = {"version": version, "formats": formats}
        check_fields("quantization_config", settings, SETTINGS[METHOD])
        OwnCheckpoint(settings)
        self.quant_method, self.version, self.formats = quant_method, version, list(formats)

    def to_dict(self) -> dict[str, Any]:
        from ..models.checkpoints.hf import own_settings

        return {**own_settings(self.formats), "version": self.version}


class LayerSkipQuantizer(HfQuantizer):
    """Put modules with packed weights into a model before its weights are loaded."""

    requires_calibration = True  # that is, weights must be quantized already

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        from ..models.checkpoints.hf import ROPE_FACTORS
        from ..models.files import EMBEDDING, HEAD
        from ..models.hf_checks import unsupported

        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise unsupported(f"quant_method {METHOD} from {checkpoint_files or 'no files'}", "safetensors files")
        shapes = _stored(checkpoint_files)
        if ROPE_FACTORS in shapes:
            holder = nn.Module()
            holder.register_buffer("weight", torch.empty(shapes[ROPE_FACTORS][1], device="meta"))
            model.add_module(ROPE_FACTORS.removesuffix(".weight"), holder)
        stacks = [name for name, (kind, shape) in shapes.items() if kind == "U8" and len(shape) > 2]
        if stacks:
            raise unsupported(f"packed experts inside transformers ({stacks[0]})", "layerskip.load")
        packed = {name: shape[1] for name, (kind, shape) in shapes.items() if kind == "U8"}
        if HEAD not in shapes and EMBEDDING in packed:
            packed[HEAD] = packed[EMBEDDING]  # one parameter, once transformers ties them
        for name, row_bytes in packed.items():
            _replace(model, name, row_bytes)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ..models.checkpoints.hf import ROPE_FACTORS

        holder = getattr(model, ROPE_FACTORS.removesuffix(".weight"), None)
        if holder is not None:
            rotary = model.model.rotary_emb
            rotary.inv_freq.div_(holder.weight.to(rotary.inv_freq))
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what was read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


def _stored(files: Sequence[str]) -> dict[str, tuple[str, list[int]]]:
    """Dtype, as safetensors names it, and shape of every tensor in files."""
    open_file = need("safetensors", "reading weights").safe_open
    found = {}
    for path in files:
        with open_file(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                stored = file.get_slice(name)
                found[name] = (stored.get_dtype(), stored.get_shape())
    return found


def _replace(model: nn.Module, name: str, row_bytes: int) -> None:
    """Replace the module of a plain weight by one with a packed weight."""
    from .packed import PackedEmbedding, PackedLinear

    module = name.removesuffix(".weight")
    plain = model.get_submodule(module)
    kind = PackedEmbedding if isinstance(plain, nn.Embedding) else PackedLinear
    try:
        with torch.device("meta"):
            model.set_submodule(module, kind(plain, row_bytes))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def register() -> None:
    """Register the method with transformers, once."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LayerSkipConfig)
        register_quantizer(METHOD)(LayerSkipQuantizer)
