"""The load format: loads the target as vLLM does, then makes a drafter of the target's own parts.

Every process of every vLLM imports it, so other imports are deferred.
"""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .settings import Settings, split

_targets: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
"""Targets by the id of the dict of attention layers that target and drafter share."""


class LayerSkipLoader(DefaultModelLoader):
    """vLLM's default loader, whose draft model reads nothing and owns nothing."""

    def __init__(self, load_config: LoadConfig) -> None:
        self._options = load_config.model_loader_extra_config
        inner = copy.copy(load_config)
        inner.load_format, inner.model_loader_extra_config = "auto", split(self._options)[1]
        super().__init__(inner)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        if vllm_config.speculative_config is None:
            raise RuntimeError("the layerskip load format is without its draft model: build the engine from EngineArgs")
        shared = id(vllm_config.compilation_config.static_forward_context)
        if model_config.runner_type != "draft":
            target = super().load_model(vllm_config, model_config, prefix)
            _targets[shared] = target
            return target
        from .draft import LayerSkipDraft

        settings = Settings.of(self._options, model_config.hf_config, model_config.model)
        return LayerSkipDraft(_targets[shared], vllm_config, prefix, settings).eval()

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> tuple[str, list[str], bool, str]:
        """vLLM's files of weights, all .safetensors, without draft head and exit."""
        from ..decoding import draft_model
        from ..models import exit

        folder, files, *rest = super()._prepare_weights(*args, **kwargs)
        others = (draft_model.FILE_NAME, exit.FILE_NAME)
        return folder, [file for file in files if Path(file).name not in others], *rest
