"""Training tasks by name, from installed packages, and datasets of the Hugging Face hub.

`layerskip.registry` says how a package provides a task. A dataset is ``hub:NAME``, with options after a question mark:
``hub:openai/gsm8k?config=main&prompt=question&completion=answer``. The keys are ``config``, ``split``
(train), ``revision``, and ``prompt`` and ``completion``, the columns that hold the texts.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from .. import registry
from .._files import write_atomically
from .._imports import need


@dataclass(frozen=True)
class Example:
    """One training pair: the model reads ``prompt`` and is to write ``completion``, then the end-of-text token.

    ``group`` names what the pair was cut from (a template, a file, a paper).
    """

    prompt: str
    completion: str
    group: str


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


PREFIX = "hub:"
DEFAULTS = {"config": None, "split": "train", "revision": None, "prompt": "prompt", "completion": "completion"}


def load_hub(source: str, prompts_only: bool = False) -> list[Example]:
    """The rows of a dataset as examples; ``group`` is the dataset.

    Parameters
    ----------
    source : str
        As the module describes it.
    prompts_only : bool
        The completions are left empty, and no column need hold them.

    Raises
    ------
    ValueError
        For a key or a column that does not exist, no rows, or a row without a text, with its number.
    ModuleNotFoundError
        Where the package ``datasets`` is absent. What its loader raises, no network among it, is passed on.
    """
    name, options = _parse_hub(source)
    rows = need("datasets", source).load_dataset(
        name, options["config"], split=options["split"], revision=options["revision"]
    )
    if not len(rows):
        raise ValueError(f"{source} has no rows")
    columns = [options["prompt"]] + ([] if prompts_only else [options["completion"]])
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has: {', '.join(rows.column_names)}")
    texts = list(zip(*(rows[column] for column in columns), strict=True))
    for number, row in enumerate(texts):
        for column, text in zip(columns, row, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{source}, row {number}: expected a text under {column!r}, got {text!r}")
    return [Example(row[0], "" if prompts_only else row[1], name) for row in texts]


def _parse_hub(source: str) -> tuple[str, dict[str, str | None]]:
    """The dataset's name and its options."""
    name, _, query = source.removeprefix(PREFIX).partition("?")
    if not name:
        raise ValueError(f"{source!r} names no dataset")
    given = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in given.items():
        if key not in DEFAULTS:
            nearest = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0)[0]
            raise ValueError(f"{source}: unknown key {key!r}, did you mean {nearest!r}?")
        if not value:
            raise ValueError(f"{source}: {key} is empty")
    return name, {**DEFAULTS, **given}
