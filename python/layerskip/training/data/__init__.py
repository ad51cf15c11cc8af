"""Three tasks whose texts ship in Python packages: semantic parsing, coding, summarization.

Every task is a module with ``SPLITS`` and ``load(split)``. A held-out split shares no prompt with training and, but for
unseen utterances of seen templates (parsing's ``test``), no group.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from ..._files import write_atomically
from ._example import Example, stable_fraction

__all__ = [
    "TASKS",
    "Example",
    "load_task",
    "splits",
    "stable_fraction",
    "write_prompts",
]

TASKS = ("parsing", "coding", "summarization")


def splits(name: str) -> tuple[str, ...]:
    """Names of the splits of a task, training first.

    Raises
    ------
    ValueError
        For an unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return tuple(import_module(f"{__name__}.{name}").SPLITS)


def load_task(name: str, split: str = "train") -> list[Example]:
    """Examples of one split of one task, always the same ones in the same order.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    split : str
        One of `splits(name)`.

    Raises
    ------
    ValueError
        For an unknown task or split.
    ModuleNotFoundError
        Where the package that ships the texts is absent.
    """
    if split not in splits(name):
        raise ValueError(f"task {name} has no split {split!r}; it has: {', '.join(splits(name))}")
    return import_module(f"{__name__}.{name}").load(split)


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
