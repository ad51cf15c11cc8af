"""LayerSkip in vLLM: with ``--load-format layerskip`` a model's first layers draft, on its own weights and KV cache.

vLLM finds `register` by the entry point ``layerskip`` of the group ``vllm.general_plugins`` and calls it in every
process, whether or not LayerSkip is used, so imports are deferred.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .settings import LOAD_FORMAT

FIRST_VERSION, NEXT_VERSION = (0, 32), (0, 33)
"""Supported versions of vLLM: from the first, before the second."""


def version_problem(version: str) -> str | None:
    """The reason why a version of vLLM is not supported, or None."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if FIRST_VERSION <= found < NEXT_VERSION:
        return None
    first, following = (".".join(map(str, bound)) for bound in (FIRST_VERSION, NEXT_VERSION))
    return f"--load-format {LOAD_FORMAT} knows the internals of vLLM >={first},<{following}; this is vLLM {version}"


@cache
def register() -> None:
    """Register the load format with vLLM.

    vLLM loads this plugin whatever it serves, so an unsupported version is an error only when the format is used.
    """
    import vllm
    from vllm.model_executor.model_loader import register_model_loader

    problem = version_problem(vllm.__version__)
    if problem is None:
        from . import engine
        from .loader import LayerSkipLoader

        engine.install()
        register_model_loader(LOAD_FORMAT)(LayerSkipLoader)
    else:
        register_model_loader(LOAD_FORMAT)(_refusing_loader(problem))


def _refusing_loader(reason: str) -> type[Any]:
    """A loader that raises ``reason`` when it is made."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class RefusingLoader(BaseModelLoader):
        def __init__(self, load_config: Any) -> None:
            raise NotImplementedError(reason)

        download_model = load_weights = __init__

    return RefusingLoader
