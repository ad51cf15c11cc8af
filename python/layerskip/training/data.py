"""Training tasks by name, from installed packages, and datasets of the Hugging Face hub.

See `layerskip.registry` for how a package provides a task. A dataset is ``hub:NAME``, with options after a question
mark: ``hub:openai/gsm8k?config=main&prompt=question&completion=answer``. The options are ``config``, ``split`` (train),
``revision``, and ``prompt`` and ``completion``, the columns that hold the texts.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from .. import registry
from .._imports import need


@dataclass(frozen=True)
class Example:
    """A training pair: the model reads ``prompt`` and is to write ``completion``, then the EOS token.

    ``group`` names the source of the pair (a template, a file, a paper).
    """

    prompt: str
    completion: str
    group: str


def splits(name: str) -> tuple[str, ...]:
    """The splits of a task, training first; ValueError or ModuleNotFoundError if no installed package provides it."""
    return tuple(registry.get(registry.TASKS, name).SPLITS)


def load_task(name: str, split: str = "train") -> list[Example]:
    """Load the examples of a split of a task, always in the same order.

    ValueError for an unknown task or split, ModuleNotFoundError if the package that ships the texts is not installed.
    """
    examples: list[Example] = _task_with(name, split).load(split)
    return examples


def documents(name: str, split: str = "test") -> list[str]:
    """Load the long texts of a split of a task, for perplexity; ValueError as `load_task`, or if there are none."""
    task = _task_with(name, split)
    if not hasattr(task, "documents"):
        raise ValueError(f"task {name} has no documents, only prompts and completions")
    texts: list[str] = task.documents(split)
    return texts


def _task_with(name: str, split: str) -> Any:
    if split not in splits(name):
        raise ValueError(f"task {name} has no split {split!r}; it has: {', '.join(splits(name))}")
    return registry.get(registry.TASKS, name)


PREFIX = "hub:"
DEFAULTS = {"config": None, "split": "train", "revision": None, "prompt": "prompt", "completion": "completion"}


def load_hub(source: str, prompts_only: bool = False) -> list[Example]:
    """Load the rows of a dataset as examples; with ``prompts_only``, completions are empty and need no column.

    ValueError for an unknown option or column, no rows, or a row without a text (with its number); errors of the
    package ``datasets``, such as no network, propagate.
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
