"""Register the ``quant_method`` "layerskip" when transformers' quantizers are imported.

So ``AutoModelForCausalLM.from_pretrained`` knows it after ``import layerskip``, which does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"


class _Finder(MetaPathFinder):
    """Find the module of quantizers as Python would, and call `_register` after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            _register()

        loader.exec_module = run_and_register
        return spec


def _register() -> None:
    from .transformers.quantizer import register

    register()


def register_with_transformers() -> None:
    """Register now if transformers' quantizers are imported, else when they are."""
    if QUANTIZERS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
