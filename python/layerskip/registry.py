"""Models, tasks and demos by name, which installed packages provide as entry points of three groups.

``layerskip.models``: a module with ``load(name, dtype) -> (model, tokenizer)`` and ``draft_head(name)``, the file of
the draft head that the model comes with, or None; and, if any model has one, ``exit(name)``, the same of an exit, and
``native(name)``, the file or directory of quantized weights that the model comes in.
``layerskip.tasks``: a module with ``SPLITS``, of which the first is for training, and ``load(split)``, a list of
`layerskip.training.data.Example`. With ``documents(split)``, a list of long texts, it serves to measure perplexity.
``layerskip.demos``: a sequence of `layerskip.cli.demo.Exhibit`.

Objects are imported when their name is looked up. ``examples/smollm2`` in the repository is such a package.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ._imports import printable

MODELS, TASKS, DEMOS = "layerskip.models", "layerskip.tasks", "layerskip.demos"
METHOD = "layerskip"
"""The ``quant_method`` that ``layerskip quantize`` writes."""

# The example package, and how to install it.
PACKAGE, WHERE = "layerskip-smollm2", "pip install ./examples/smollm2 (in the repository)"
# Its names, to distinguish them from typos if it is not installed.
EXAMPLE = {
    MODELS: ("smollm2", "smollm2-layerskip", "smollm2-layerskip-coding", "smollm2-layerskip-summarization"),
    TASKS: ("chat", "coding", "parsing", "summarization", "text"),
    DEMOS: ("smollm2",),
}
OTHERWISE = {MODELS: "; or give a directory or owner/name", TASKS: "; or give hub:NAME or a file", DEMOS: ""}


def names(group: str) -> list[str]:
    """The names of a group that installed packages provide."""
    return sorted({entry.name for entry in entry_points(group=group)})


def find(group: str, name: str) -> Any | None:
    """The object that an installed package provides under a name, or None; ValueError if two packages do."""
    found = list(entry_points(group=group, name=name))
    if len(found) > 1:
        raise ValueError(f"{name!r} of {group} is provided twice: {', '.join(entry.value for entry in found)}")
    return found[0].load() if found else None


def get(group: str, name: str) -> Any:
    """Like `find`, but raise for a name that no package provides."""
    provided = find(group, name)
    if provided is None:
        raise unknown(group, name)
    return provided


def check(group: str, name: str) -> None:
    """Raise for a name that no package provides, without importing anything."""
    if name not in names(group):
        raise unknown(group, name)


def check_model(name: str) -> None:
    """Raise for a model that no package provides and that is not on the disk; the hub is not asked."""
    if name in names(MODELS):
        return
    if not is_path(name):
        if "/" not in name:
            raise unknown(MODELS, name)
    elif not (path := Path(name).expanduser()).exists():
        raise FileNotFoundError(f"no such directory: {path}{similar_file(path)}")


def similar_file(path: Path) -> str:
    """A hint for an error message: the files beside ``path`` with similar names, or nothing."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return ""
    hint = nearest(path.name, sorted(entry.name for entry in folder.iterdir()))
    return printable(f"; {hint}") if hint.startswith("did you mean") else ""


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a path: neither ``name`` nor ``owner/name``, or an existing file."""
    if not isinstance(name, str):
        return True
    return Path(name).exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/")


def unknown(group: str, name: str) -> Exception:
    """The error for a name that no installed package provides."""
    if name in EXAMPLE[group]:
        return ModuleNotFoundError(hint(group, name))
    return ValueError(f"unknown {_kind(group)} {name!r}; {hint(group, name)}{OTHERWISE[group]}")


def hint(group: str, name: str) -> str:
    """How to install what provides the name, or similar names."""
    if name in EXAMPLE[group]:
        return f"the {_kind(group)} {name} comes with the example package: {WHERE}"
    return nearest(name, sorted({*names(group), *EXAMPLE[group]}))


def nearest(name: str, known: Iterable[str]) -> str:
    """Similar known names, or else all."""
    known = list(known)
    near = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


def _kind(group: str) -> str:
    return group.removeprefix("layerskip.").removesuffix("s")


def draft_head(name: str) -> Path | None:
    """The file of a model's draft head; None if no package provides the model, ValueError if it has none."""
    return _part(name, "draft_head", "a draft head")


def exit(name: str) -> Path | None:
    """The file of a model's exit, like `draft_head`."""
    return _part(name, "exit", "an exit")


def shipped_exit(name: str) -> Path | None:
    """The file of a model's exit; None if no package provides the model, or it has none."""
    path: Path | None = getattr(find(MODELS, name), "exit", lambda name: None)(name)
    return path


def _part(name: str, function: str, title: str) -> Path | None:
    provider = find(MODELS, name)
    if provider is None:
        return None
    path: Path | None = getattr(provider, function, lambda name: None)(name)
    if path is None:
        raise ValueError(f"the model {name} comes without {title}")
    return path
