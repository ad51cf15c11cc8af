"""Datasets of the Hugging Face hub, or directories that `datasets` reads, as pairs.

A source is ``hub:NAME``, with what differs from the defaults after a question mark, as in
``hub:openai/gsm8k?config=main&prompt=question&completion=answer``. The keys are ``config``, ``split`` (train),
``revision``, and ``prompt`` and ``completion``, the columns that hold the texts.
"""

from __future__ import annotations

import difflib
from urllib.parse import parse_qsl

from ..._extras import need
from ._example import Example

PREFIX = "hub:"
DEFAULTS = {"config": None, "split": "train", "revision": None, "prompt": "prompt", "completion": "completion"}


def load(source: str, prompts_only: bool = False) -> list[Example]:
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
    name, options = _parse(source)
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


def _parse(source: str) -> tuple[str, dict[str, str | None]]:
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
