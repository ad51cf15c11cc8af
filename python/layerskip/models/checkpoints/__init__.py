"""Checkpoints of quantized weights: one file for each layout, and a model built of what they read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..hf_checks import unsupported
from .base import (
    KEEPS_ROWS,
    Checkpoint,
    ModelTensors,
    PlainCheckpoint,
    Progress,
    TensorFiles,
    without_quantization,
)
from .gguf import SUFFIX, GgufCheckpoint, check_architecture
from .hf import (
    METHOD,
    ROPE_FACTORS,
    AwqCheckpoint,
    CompressedTensorsCheckpoint,
    FineGrainedCheckpoint,
    GptqCheckpoint,
    OwnCheckpoint,
    own_settings,
)

__all__ = [
    "KEEPS_ROWS",
    "LAYOUTS",
    "METHOD",
    "ROPE_FACTORS",
    "SUFFIX",
    "Checkpoint",
    "GgufCheckpoint",
    "ModelTensors",
    "OwnCheckpoint",
    "PlainCheckpoint",
    "Progress",
    "TensorFiles",
    "check_architecture",
    "checkpoint_of",
    "method_of",
    "own_settings",
    "without_quantization",
]

LAYOUTS: dict[str, type[Checkpoint]] = {
    METHOD: OwnCheckpoint,
    "compressed-tensors": CompressedTensorsCheckpoint,
    "gptq": GptqCheckpoint,
    "awq": AwqCheckpoint,
    "fp8": FineGrainedCheckpoint,
}
"""The reader of a checkpoint by the ``quant_method`` of its ``quantization_config``."""
GGUF = "gguf"  # the quant_method of GGUF files that transformers has dequantized


def method_of(config: Any) -> str | None:
    """The ``quant_method`` of a configuration whose weights may be quantized; None if they are plain."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings.quant_method
    method = str(getattr(method, "value", method))
    return None if method == GGUF else method


def layout_of(method: str) -> type[Checkpoint]:
    """The reader of checkpoints of this ``quant_method``, or UnsupportedModelError."""
    if method not in LAYOUTS:
        raise unsupported(f"a model quantised with {method}", f"{', '.join(LAYOUTS)}, and plain weights")
    return LAYOUTS[method]


def checkpoint_of(config: Any) -> Checkpoint:
    """The reader of a configuration's checkpoint; UnsupportedModelError for an unknown method or setting."""
    settings = config.quantization_config
    given = settings if isinstance(settings, Mapping) else settings.to_dict()
    return layout_of(str(method_of(config)))(json.loads(json.dumps(given, default=str)))  # with names in place of enums
