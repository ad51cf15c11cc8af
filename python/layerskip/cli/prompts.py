"""Prompts of a task, of a dataset, from a file, or the ones that come with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.data import hub, load_task

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
    task, colon, split = source.partition(":")
    if source.startswith(hub.PREFIX):
        prompts = [Prompt(example.prompt) for example in hub.load(source, prompts_only=True)]
    elif colon and "/" not in source and not Path(source).exists():
        prompts = [Prompt(example.prompt, task) for example in load_task(task, split) if example.prompt]
    else:
        prompts = _from_file(SAMPLES if source == "samples" else Path(source))
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def _from_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file at {path}")
    prompts = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
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
