"""The load format where this vLLM is not supported."""

from __future__ import annotations

from typing import Any

from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader


def refusing_loader(reason: str) -> type[BaseModelLoader]:
    """A loader that raises ``reason`` as soon as it is made."""

    class RefusingLoader(BaseModelLoader):
        def __init__(self, load_config: LoadConfig) -> None:
            raise NotImplementedError(reason)

        def download_model(self, model_config: Any) -> None:
            raise NotImplementedError(reason)

        def load_weights(self, model: Any, model_config: Any) -> None:
            raise NotImplementedError(reason)

    return RefusingLoader
