"""Tasks by name: texts to train on and to measure with, from installed packages; `hub` has the Hugging Face hub's.

`layerskip.registry` says how a package provides a task.
"""

from __future__ import annotations

import json
from pathlib import Path

from ... import registry
from ..._files import write_atomically
from ._example import Example

__all__ = [
    "Example",
    "documents",
    "load_task",
    "splits",
    "write_prompts",
]


def splits(name: str) -> tuple[str, ...]:
    """Names of the splits of a task, training first.

    Raises
    ------
    ValueError, ModuleNotFoundError
        If no installed package provides the task.
    """
    return tuple(registry.get(registry.TASKS, name).SPLITS)


def load_task(name: str, split: str = "train") -> list[Example]:
    """Examples of one split of one task, always the same ones in the same order.

    Parameters
    ----------
    name : str
        One of ``registry.names(registry.TASKS)``.
    split : str
        One of `splits(name)`.

    Raises
    ------
    ValueError
        For an unknown task or split.
    ModuleNotFoundError
        Where the package that ships the texts is absent.
    """
    _check_split(name, split)
    examples: list[Example] = registry.get(registry.TASKS, name).load(split)
    return examples


def documents(name: str, split: str = "test") -> list[str]:
    """Long texts of one split of one task, to measure perplexity on.

    Raises
    ------
    ValueError
        For an unknown task or split, or a task that has no long texts.
    """
    _check_split(name, split)
    task = registry.get(registry.TASKS, name)
    if not hasattr(task, "documents"):
        raise ValueError(f"task {name} has no documents, only prompts and completions")
    texts: list[str] = task.documents(split)
    return texts


def _check_split(name: str, split: str) -> None:
    if split not in splits(name):
        raise ValueError(f"task {name} has no split {split!r}; it has: {', '.join(splits(name))}")


def write_prompts(task: str, split: str, path: str | Path, limit: int | None = None) -> int:
    """Write the prompts of a split as JSONL with the fields ``prompt``, ``completion`` and ``task``; return how many.

    Parameters
    ----------
    task, split : str
        As `load_task` takes them.
    path : str or Path
        Written under a temporary name, then renamed.
    limit : int, optional
        Write only the first ones.
    """
    examples = load_task(task, split)[:limit]
    records = ({"prompt": e.prompt, "completion": e.completion, "task": task} for e in examples)
    write_atomically(Path(path), "".join(json.dumps(record) + "\n" for record in records).encode())
    return len(examples)
