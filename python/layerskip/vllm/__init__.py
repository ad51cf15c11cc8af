"""LayerSkip in vLLM: ``--load-format layerskip`` lets a model's first layers draft, on its own weights and KV cache.

vLLM finds `register` by the entry point ``layerskip`` of the group ``vllm.general_plugins`` and calls it in every
process, whether or not a model is served with LayerSkip. So nothing is imported before it is needed.
"""

from __future__ import annotations

from functools import cache

LOAD_FORMAT = "layerskip"
FIRST_VERSION, NEXT_VERSION = (0, 32), (0, 33)
"""The versions of vLLM whose internals this package knows: from the first, before the second."""


def version_problem(version: str) -> str | None:
    """Why this package does not work with a version of vLLM, or None."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if FIRST_VERSION <= found < NEXT_VERSION:
        return None
    first, following = (".".join(map(str, bound)) for bound in (FIRST_VERSION, NEXT_VERSION))
    return f"--load-format {LOAD_FORMAT} knows the internals of vLLM >={first},<{following}; this is vLLM {version}"


@cache
def register() -> None:
    """Make the load format known to vLLM; without the format nothing changes.

    An unsupported vLLM is an error only where the format is used: the plugin loads in everybody's vLLM.
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
        from .refusal import refusing_loader

        register_model_loader(LOAD_FORMAT)(refusing_loader(problem))
