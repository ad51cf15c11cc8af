"""Checkpoints of quantized weights: one file for each layout, and a model built of what they read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..hf_checks import unsupported
from .base import (
    KEEPS_ROWS,
    Checkpoint,
    HeldTensors,
    PlainCheckpoint,
    Progress,
    SafetensorsCheckpoint,
    TensorFiles,
    build,
    frequency_factors,
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
    "HeldTensors",
    "OwnCheckpoint",
    "PlainCheckpoint",
    "Progress",
    "SafetensorsCheckpoint",
    "TensorFiles",
    "build",
    "check_architecture",
    "frequency_factors",
    "layout_of",
    "method_of",
    "own_settings",
    "settings_of",
    "without_quantization",
]

LAYOUTS: dict[str, type[SafetensorsCheckpoint]] = {
    METHOD: OwnCheckpoint,
    "compressed-tensors": CompressedTensorsCheckpoint,
    "gptq": GptqCheckpoint,
    "awq": AwqCheckpoint,
    "fp8": FineGrainedCheckpoint,
}
"""What reads a checkpoint, by the ``quant_method`` of its ``quantization_config``."""


def settings_of(config: Any) -> Mapping[str, Any]:
    """The ``quantization_config`` of a model's configuration, as config.json has it: names in the place of enums."""
    settings = config.quantization_config
    given = settings if isinstance(settings, Mapping) else settings.to_dict()
    as_written: Mapping[str, Any] = json.loads(json.dumps(given, default=str))
    return as_written


def method_of(config: Any) -> str | None:
    """The ``quant_method`` of a model's configuration; None where it says nothing of quantization."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings.quant_method
    return str(getattr(method, "value", method))


def layout_of(method: str | None) -> type[SafetensorsCheckpoint]:
    """What reads a checkpoint of this ``quant_method``; UnsupportedModelError for others."""
    if method not in LAYOUTS:
        raise unsupported(f"a model quantised with {method}", f"{', '.join(LAYOUTS)}, and plain weights")
    return LAYOUTS[method]
