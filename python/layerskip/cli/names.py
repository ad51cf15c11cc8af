"""Names that nothing has are told before what is slow to import is imported."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from .. import registry
from ..training.data import hub
from . import prompts


def check(args: argparse.Namespace) -> None:
    """Raise where a command's arguments name what does not exist."""
    if args.command == "demo":
        registry.check(registry.DEMOS, args.name)
    if args.command in ("train", "train-exit") and args.recipe is not None:
        recipe(args.recipe)
    if args.command == "report":
        measurements(args.files)
    if "prompts" in args:
        prompts.check(args.prompts)
    if getattr(args, "model", None) is not None:
        model(args.model)
    if isinstance(getattr(args, "draft_head", None), str):
        draft_head(args.draft_head)
    if getattr(args, "exit", None) is not None:
        _part(args.exit, "exit", [])


def model(name: str) -> None:
    """Raise for a model that no package provides and that is on no disk; what is on the hub is not looked up."""
    if name in registry.names(registry.MODELS):
        return
    if not registry.is_path(name):
        if "/" not in name:
            raise registry.unknown(registry.MODELS, name)
    elif not (path := Path(name).expanduser()).exists():
        raise FileNotFoundError(f"no such directory: {path}{_beside(path)}")


def tasks(names: Iterable[str]) -> None:
    """Raise for what is to be learned and is neither a task, nor a file, nor of the hub."""
    for name in names:
        if not name.startswith(hub.PREFIX) and not Path(name).is_file():
            registry.check(registry.TASKS, name)


def recipe(path: Path) -> None:
    """Raise where there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}{_beside(path)}")


def measurements(paths: Iterable[Path]) -> None:
    """Raise where there is no such file."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no measurements at {path}{_beside(path)}")


def draft_head(name: str) -> None:
    """Raise for a draft head that is no way of scoring, no model's, and on no disk."""
    _part(name, "draft head", ["full", "int8"])


def _part(name: str, what: str, ways: list[str]) -> None:
    known = [*ways, *registry.names(registry.MODELS)]
    if name in known or Path(name).expanduser().exists():
        return
    if name in registry.EXAMPLE[registry.MODELS]:
        raise registry.unknown(registry.MODELS, name)
    hint = _beside(Path(name)) or ("" if "/" in name else f"; {registry.nearest(name, known)}")
    raise FileNotFoundError(f"no {what} at {name}{hint}")


def _beside(path: Path) -> str:
    """Of what lies in the same folder, that with the nearest names."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return ""
    hint = registry.nearest(path.name, sorted(entry.name for entry in folder.iterdir()))
    return f"; {hint}" if hint.startswith("did you mean") else ""
