"""The load format: loads the target as vLLM ever does, and hands out a drafter made of the target's own parts.

It is imported in every process of every vLLM, so what only its users need is imported inside.
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

_targets: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
"""By the id of the dict of attention layers that the configurations of a target and of its drafter have in common."""


class LayerSkipLoader(DefaultModelLoader):
    """vLLM's default loader; the draft model that it is asked for afterwards reads nothing and owns nothing."""

    def __init__(self, load_config: LoadConfig) -> None:
        from .settings import split

        self._options = load_config.model_loader_extra_config
        inner = copy.copy(load_config)
        inner.load_format, inner.model_loader_extra_config = "auto", split(self._options)[1]
        super().__init__(inner)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """The target, or the drafter over it."""
        if vllm_config.speculative_config is None:
            raise RuntimeError("the layerskip load format is without its draft model: build the engine from EngineArgs")
        shared = id(vllm_config.compilation_config.static_forward_context)
        if model_config.runner_type != "draft":
            target = super().load_model(vllm_config, model_config, prefix)
            _targets[shared] = target
            return target
        from .draft import LayerSkipDraft
        from .settings import Settings

        settings = Settings.of(self._options, model_config.hf_config, model_config.model)
        return LayerSkipDraft(_targets[shared], vllm_config, prefix, settings).eval()

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> tuple[str, list[str], bool, str]:
        """vLLM's files of weights without draft head and exit: it takes all that end in .safetensors."""
        from ..decoding import draft_model
        from ..models import exit

        folder, files, *rest = super()._prepare_weights(*args, **kwargs)
        others = (draft_model.FILE_NAME, exit.FILE_NAME)
        return folder, [file for file in files if Path(file).name not in others], *rest
