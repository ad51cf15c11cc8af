"""Prompts of a task, of a dataset, from a file, or the ones that come with the package."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import registry
from ..training.data import hub, load_task, splits

HELP = "samples, TASK:SPLIT such as parsing:test, hub:DATASET, a .jsonl file, or a text file"
SAMPLES = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and the kind of task that it is."""

    text: str
    task: str = ""


def read(source: str, limit: int | None = None) -> list[Prompt]:
    """Read prompts.

    Parameters
    ----------
    source : str
        ``samples``, TASK:SPLIT as `layerskip.training.data` has them, such as ``parsing:test``, ``hub:NAME`` as
        `layerskip.training.data.hub` has it, a ``.jsonl`` file of objects with "prompt" and, optionally, "task", or a
        text file with one prompt a line.
    limit : int, optional
        Take every n-th prompt so that this many remain, spread over the whole source.

    Raises
    ------
    ValueError
        With the file and the line, if a line cannot be used; for an unknown task or split, or where there is no prompt.
    FileNotFoundError
        If there is no such file.
    """
    check(source)
    if source.startswith(hub.PREFIX):
        prompts = [Prompt(example.prompt) for example in hub.load(source, prompts_only=True)]
    elif _is_task(source):
        task, _, split = source.partition(":")
        prompts = [Prompt(example.prompt, task) for example in load_task(task, split) if example.prompt]
    else:
        prompts = _from_file(SAMPLES if source == "samples" else Path(source))
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def check(source: str) -> None:
    """Raise what `read` raises for a task, a split or a file that does not exist, without reading it."""
    if source.startswith(hub.PREFIX) or source == "samples":
        return
    if _is_task(source):
        task, _, split = source.partition(":")
        registry.check(registry.TASKS, task)
        known = splits(task)
        if split not in known:
            raise ValueError(f"task {task} has no split {split!r}; {registry.nearest(split, known)}")
    elif not Path(source).is_file():
        raise FileNotFoundError(f"no prompts file at {source}{_meant(source)}")


def _is_task(source: str) -> bool:
    """TASK:SPLIT; what has a slash, or exists, is a file."""
    return ":" in source and "/" not in source and not Path(source).exists()


def _meant(source: str) -> str:
    """What may have been meant by a name that is no file."""
    if "/" in source or "." in source:
        return ""
    tasks = registry.names(registry.TASKS)
    if source in tasks:
        return f"; of the task {source}, name a split: {' or '.join(f'{source}:{split}' for split in splits(source))}"
    return f"; {registry.nearest(source, ['samples', *tasks])}"


def _from_file(path: Path) -> list[Prompt]:
    prompts = []
    for number, raw in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
        if line:
            prompts.append(_from_json(line, where) if path.suffix == ".jsonl" else Prompt(line))
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with a prompt, got {line[:40]}")
    text, task = record.get("prompt"), record.get("task", "")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: expected a text under "prompt", got {text!r}')
    if not isinstance(task, str):
        raise ValueError(f'{where}: expected a text under "task", got {task!r}')
    return Prompt(text, task)
