"""Checkpoints of quantized weights: one file for each layout, and a model built of what they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..unsupported import unsupported
from .awq import AwqCheckpoint
from .build import Progress, build, frequency_factors, without_quantization
from .checkpoint import Checkpoint, SafetensorsCheckpoint
from .compressed_tensors import CompressedTensorsCheckpoint
from .fine_grained import FineGrainedCheckpoint
from .gguf import SUFFIX, GgufCheckpoint, check_architecture
from .gptq import GptqCheckpoint
from .own import METHOD, ROPE_FACTORS, OwnCheckpoint, own_settings
from .plain import PlainCheckpoint
from .tensors import TensorFiles

__all__ = [
    "LAYOUTS",
    "METHOD",
    "ROPE_FACTORS",
    "SUFFIX",
    "Checkpoint",
    "GgufCheckpoint",
    "PlainCheckpoint",
    "Progress",
    "TensorFiles",
    "build",
    "check_architecture",
    "frequency_factors",
    "layout_of",
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


def settings_of(config: Any) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a model's configuration, if it has one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None or isinstance(settings, Mapping):
        return settings
    given: Mapping[str, Any] = settings.to_dict()
    return given


def layout_of(settings: Mapping[str, Any]) -> type[SafetensorsCheckpoint]:
    """What reads a checkpoint with these settings; UnsupportedModelError for other methods."""
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
    if method not in LAYOUTS:
        raise unsupported(f"a model quantised with {method}", f"{', '.join(LAYOUTS)}, and plain weights")
    return LAYOUTS[method]
