"""A patch of transformers, so that ``custom_generate`` gets the streamer and the tokenizer of ``model.generate``.

``GenerationMixin.generate`` of transformers 4.57 to 5.24 drops both if ``custom_generate`` is a callable: the streamer
would get the prompt and nothing after it, and stop strings would have no tokenizer. So the method that drops them is
wrapped. It changes nothing for any other callable than this library's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .compatibility import check_cache

_METHOD = "_extract_generation_mode_kwargs"


def patch_generation_mixin(function: Callable[..., Any]) -> None:
    """Pass ``streamer``, ``tokenizer``, ``assistant_model`` and ``synced_gpus`` to ``custom_generate=function``.

    Raises
    ------
    ImportError
        If the installed transformers has another way of calling ``custom_generate``.
    """
    import transformers
    from transformers.generation.utils import GenerationMixin

    original = getattr(GenerationMixin, _METHOD, None)
    if original is None:
        raise ImportError(
            f"transformers {transformers.__version__} has no GenerationMixin.{_METHOD}, through which "
            "layerskip.generate is given the streamer and the tokenizer; 4.57 to 5.24 have it"
        )

    @functools.wraps(original)
    def extract(
        self: Any, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        dropped = {
            "tokenizer": kwargs.get("tokenizer"),
            "assistant_model": assistant_model,
            "streamer": streamer,
            "synced_gpus": synced_gpus,
        }
        found = original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        if getattr(custom_generate, "func", custom_generate) is function:  # itself, or a partial of it
            check_cache(kwargs)  # later it looks like the one that transformers makes
            found |= {name: value for name, value in dropped.items() if value is not None}
        return found

    setattr(GenerationMixin, _METHOD, extract)
