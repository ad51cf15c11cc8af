"""The file in an output folder that says which run is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import write_atomically
from .._journal import differences


def read_record(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What `write_record` wrote; empty, if there is no such file.

    Raises
    ------
    ValueError
        If the file is no record, or one without these keys.
    """
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(record, dict) or not set(keys) <= record.keys():
        raise ValueError(f"{path} is no record of a training run")
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    write_atomically(path, json.dumps(record, indent=1).encode())


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], harmless: Sequence[str]) -> None:
    """Raise ValueError, with the differences, where a run was another one but for its ``harmless`` keys."""
    before, now = ({key: value for key, value in one.items() if key not in harmless} for one in (before, now))
    changed = differences(before, now)
    if changed:
        raise ValueError(f"{folder} was trained with another recipe: {changed}")
