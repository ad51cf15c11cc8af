"""The files that a page shows, known by what is in them: of `layerskip bench`, and of `layerskip exits`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .shapes import Above, Each, Maybe, check

_TOLD = {
    "pieces": [str],
    "rounds": [{"source": str, "exit_layer": int, "drafts": [str], "accepted": int, "emitted": int}],
}
_DRAFTS = {"by_source": Each((int, int)), "by_position": Each([(int, int)])}
_RUN = {
    "prompt": int, "tokens": int, "seconds": float, "first_token": float, "bytes_per_token": float, "drafted": int,
    "accepted": int, "drafts?": _DRAFTS, "told?": _TOLD,
}  # fmt: skip
_SPEED = Above(0)
_SWEEP = {
    "task": str, "draft_threshold": float, "fixed": Each(_SPEED), "auto": _SPEED, "autoregressive": _SPEED,
    "by_source": Each(_SPEED),
}  # fmt: skip
_NUMBERS = (
    "milliseconds_to_first_token", "acceptance_rate", "speedup_of_means", "mean_speedup",
    "megabytes_per_token", "gigabytes_per_second", "fraction_of_bandwidth",
)  # fmt: skip
_SUMMARY = Each(Maybe({**dict.fromkeys(_NUMBERS, float), "tokens_per_second": _SPEED}))
FIXED = re.compile(r"E=(\d+), K=(\d+)")
"""How a sweep names a fixed choice."""
BENCH = {
    "settings": {"model": str, "dtype": str, "device": str, "threads?": int, "draft_threshold?": float},
    "machine?": Each(str),
    "complete?": bool,
    "identical": bool,
    "read_gigabytes_per_second": float,
    "summary": _SUMMARY,
    "by_task": Each(_SUMMARY),
    "runs": Each([_RUN]),
    "prompts?": [{"task": str, "text": str}],
    "skipped": [{"prompt": int, "reason": str}],
    "throughput": [{"size": int, "tokens_per_second": Each(_SPEED), "identical": bool}],
    "sweep": [_SWEEP],
}
_EXIT = {
    "label": str, "agreement": float, "confidence": Maybe(float), "error": Maybe(float), "tokens_per_round": float,
    "bound": _SPEED,
}  # fmt: skip
EXITS = {
    "settings": {
        "model": str,
        "dtype": str,
        "device": str,
        "prompts": str,
        "positions": int,
        "num_speculations": int,
        "layers": Above(0),
    },
    "machine?": Each(str),
    "exits": [_EXIT],
    "reliability": Each([{"positions": float, "confidence": float, "agreement": float}]),
}
KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {"bench": ("runs", BENCH), "exits": ("exits", EXITS)}
"""A command -> the key by which its files are known, and their shape."""


class Measured(NamedTuple):
    """A file: its name, the command that wrote it, and what is in it, checked."""

    name: str
    kind: str
    content: dict[str, Any]


def read(path: Path) -> Measured:
    """Read a file.

    Raises
    ------
    ValueError
        With the file's name, where it is no such file, or is broken.
    OSError
        Where it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    for kind, (key, shape) in KINDS.items():
        if isinstance(content, dict) and key in content:
            try:
                check(content, shape, "")
                _check_parts(content)
            except ValueError as error:
                raise ValueError(f"{path} looks like a file of layerskip {kind}, but {error}") from error
            return Measured(path.name, kind, content)
    raise ValueError(f"{path} was written neither by layerskip bench nor by layerskip exits")


def _check_parts(content: dict[str, Any]) -> None:
    """That what belongs together fits together."""
    prompts = len(content["prompts"]) if content.get("prompts") else None
    for name, runs in content.get("runs", {}).items():
        for index, run in enumerate(runs):
            where = f"runs.{name}[{index}]"
            if run["tokens"] > 0 >= run["seconds"]:
                raise ValueError(f"{where} has {run['tokens']} tokens in {run['seconds']} seconds")
            if prompts is not None and not 0 <= run["prompt"] < prompts:
                raise ValueError(f"{where} is of prompt {run['prompt']}, and there are {prompts}")
            if "told" in run:
                _check_told(run["told"], prompts, where)
    if content.get("exits") == []:
        raise ValueError("exits is empty")
    for index, task in enumerate(content.get("sweep", [])):
        if not task["fixed"]:
            raise ValueError(f"sweep[{index}].fixed is empty")
        for name in task["fixed"]:
            if FIXED.fullmatch(name) is None:
                raise ValueError(f"sweep[{index}].fixed has {name!r}, expected such as 'E=4, K=8'")
    names = {tuple(batch["tokens_per_second"]) for batch in content.get("throughput", [])}
    if len(names) > 1:
        raise ValueError(f"throughput has batches of different ways: {sorted(names)}")


def _check_told(told: dict[str, Any], prompts: int | None, where: str) -> None:
    if told["pieces"] and prompts is None:
        raise ValueError(f"{where} has texts, and there are no prompts")
    given = sum(one["emitted"] for one in told["rounds"])
    if told["pieces"] and given != len(told["pieces"]) - 1:
        raise ValueError(
            f"{where} has {len(told['pieces'])} new tokens, of which its rounds give {given}, not all but 1"
        )
    for number, one in enumerate(told["rounds"]):
        if not (0 <= one["accepted"] <= len(one["drafts"]) and one["emitted"] - one["accepted"] in (0, 1)):
            raise ValueError(
                f"{where}.told.rounds[{number}] has {one['accepted']} accepted of {len(one['drafts'])} drafts and "
                f"emitted {one['emitted']}"
            )
