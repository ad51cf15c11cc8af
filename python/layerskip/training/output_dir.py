"""The output directory of a training run: which run wrote it, and whether another may write there or resume it."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._files import MANIFEST, check_folder, differences, obstacle, remove_written, write_atomically
from ..models.exit import FILE_NAME, Exit
from .recipe import ExitRecipe, Recipe, with_new_keys


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


RECORD = "layerskip-run.json"
RESULTS = ("adapter", "model")
HARMLESS = ("output", "log_every", "save_every", "eval_split", "eval_examples")
"""Keys of a recipe that a resumed run may change: they change neither a step nor what is written at the end."""


def results(recipe: Recipe) -> list[Path]:
    """What a recipe's run writes at its end; the model is the last."""
    return [Path(recipe.output) / name for name in RESULTS if name == "model" or recipe.method == "lora"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below ``folder`` that this library wrote, oldest first; each is whole."""
    return [path for path in _checkpoint_like(folder) if (path / MANIFEST).exists()]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below ``folder``."""
    return next(reversed(checkpoints(folder)), None)


def _checkpoint_like(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def digest(pairs: Sequence[Mapping[str, list[int]]]) -> str:
    """Of all tokens and labels, in their order."""
    made = hashlib.sha256()
    for pair in pairs:
        for key in ("input_ids", "labels"):
            made.update(array("q", [len(pair[key]), *pair[key]]).tobytes())
    return made.hexdigest()


class Output:
    """What is in the folder that a recipe writes to.

    ``layerskip-run.json`` there holds the whole recipe, what else the steps depend on, and whether the run is finished.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.folder, self.recipe = Path(recipe.output), recipe
        self.results = results(recipe)
        self.record = read_record(self.folder / RECORD, ("recipe", "data", "finished"))

    @property
    def finished(self) -> bool:
        """Whether a run came to its end here, and its results are there."""
        return bool(self.record.get("finished")) and all(path.exists() for path in self.results)

    def check_new(self, overwrite: bool) -> None:
        """Raise OSError where a new run would meet an older one, somebody's files, or its own model."""
        check_folder(self.folder)
        self._check_inputs(overwrite)
        older = [self.folder / name for name in RESULTS if (self.folder / name).exists()]
        if not overwrite:
            self._check_vacant(older)
        for path in (*older, *_checkpoint_like(self.folder)):
            reason = obstacle(path)
            if reason is not None:
                raise FileExistsError(f"{reason}, or give another output")

    def check_resumed(self) -> Path | None:
        """The checkpoint to go on from, None only for a finished run; ValueError where it is of another recipe."""
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is None and not self.finished:
            raise ValueError(f"there is no whole checkpoint in {self.folder} to resume from")
        if not self.record:
            raise ValueError(f"{self.folder} has no {RECORD}, so nothing tells which recipe its checkpoints are of")
        self._check_inputs(overwrite=True)
        check_same(self.folder, self.record["recipe"], _as_json(asdict(self.recipe)), HARMLESS)
        return checkpoint

    def check_same_data(self, data: Mapping[str, Any]) -> None:
        """Raise ValueError where the run that is here saw other examples, or on another number of processes."""
        check_same(self.folder, self.record["data"], _as_json(data), HARMLESS)

    def begin(self, data: Mapping[str, Any]) -> None:
        """Make room for a new run: remove an older one's checkpoints, and write down which one this is.

        The older one's results stay until this run's take their places.
        """
        for path in checkpoints(self.folder):
            remove_written(path)
        self._write({"recipe": _as_json(asdict(self.recipe)), "data": _as_json(data), "finished": False})

    def finish(self) -> None:
        """Write down that the results are there; those of an older run that this one has not, go."""
        for name in RESULTS:
            if self.folder / name not in self.results and (self.folder / name / MANIFEST).exists():
                remove_written(self.folder / name)
        self._write({**self.record, "finished": True})

    def _check_vacant(self, older: Sequence[Path]) -> None:
        go_on = "give another output, or --overwrite to replace what layerskip wrote there"
        if self.record.get("finished"):
            raise FileExistsError(f"{self.folder} holds a finished run; {go_on}")
        if _checkpoint_like(self.folder):
            raise FileExistsError(f"{self.folder} holds checkpoints of a run; --resume to go on with it, or {go_on}")
        if older:
            raise FileExistsError(f"{older[0]} is there, which this run would write; {go_on}")

    def _check_inputs(self, overwrite: bool) -> None:
        """The model and the adapter that the run starts from are not where it writes to."""
        root = self.folder.resolve()
        for key in ("model", "adapter"):
            value = getattr(self.recipe, key)
            path = Path(value or "").expanduser().resolve()
            if value is None or not path.exists() or not path.is_relative_to(root):
                continue
            first = path.relative_to(root).parts[:1]
            if first and (first[0] in RESULTS or first[0].startswith("checkpoint-")):
                raise FileExistsError(
                    f"{key} {value} is in {self.folder / first[0]}, which this run would replace; give another output"
                )
            if not overwrite:
                raise FileExistsError(
                    f"output {self.folder} holds {key} {value}; give another output, or --overwrite to write beside it"
                )

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record
        write_record(self.folder / RECORD, record)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read back, nested keys as ``outer.inner``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if key in ("replay", "layer_dropout") else {}
        flat |= {f"{key}.{name}": item for name, item in inner.items()} if inner else {key: value}
    read: dict[str, Any] = json.loads(json.dumps(flat))
    return read


_EXIT_RECORD = "layerskip-exit.json"
CHECKPOINT, CURVE, TRUNKS = "checkpoint.pt", "curve.png", "trunk"
_EXIT_HARMLESS = ("output", "trunk", "model", "texts", "eval_texts", "prompts", "init_exit")
"""Keys that a resumed run may change: what they stand for is compared itself."""


class ExitOutput:
    """What is in the folder that a recipe writes to: ``exit.safetensors``, the best so far, and how to go on.

    ``layerskip-exit.json`` there says which run it is, what it wrote, and whether it is finished.
    """

    def __init__(self, recipe: ExitRecipe) -> None:
        self.folder, self.recipe = Path(recipe.output), recipe
        self.exit, self.checkpoint, self.curve = (self.folder / name for name in (FILE_NAME, CHECKPOINT, CURVE))
        self.record = read_record(self.folder / _EXIT_RECORD, ("recipe", "data", "exits", "finished"))

    @property
    def finished(self) -> bool:
        """Whether a run came to its end here."""
        return bool(self.record.get("finished")) and self.exit.exists()

    def check_new(self, overwrite: bool) -> None:
        """Raise OSError where a new run would meet an older one or somebody's files, or replace its own model."""
        check_folder(self.folder)
        model = Path(self.recipe.model).expanduser()
        if model.exists() and model.resolve().is_relative_to(self.folder.resolve()):
            raise FileExistsError(f"model {model} is in the output {self.folder}; give another output")
        if not self.record:
            for path in (self.exit, self.checkpoint, self.curve, self.folder / TRUNKS):
                if path.exists():
                    raise FileExistsError(
                        f"{path} was not written by this command; move it away, or give another output"
                    )
            return
        self._check_unchanged()
        if not overwrite:
            go_on = "give another output, or --overwrite to replace it"
            if self.record["finished"]:
                raise FileExistsError(f"{self.folder} holds a finished run; {go_on}")
            raise FileExistsError(f"{self.folder} holds a run that was begun; --resume to go on with it, or {go_on}")

    def check_resumed(self) -> None:
        """Raise ValueError where there is no run, or another recipe's."""
        if not self.record:
            raise ValueError(f"there is no run in {self.folder} to resume: it has no {_EXIT_RECORD}")
        recipe = with_new_keys(self.record["recipe"])
        check_same(self.folder, recipe, json.loads(json.dumps(asdict(self.recipe))), _EXIT_HARMLESS)
        self._check_unchanged()

    def check_same_data(self, data: Mapping[str, Any]) -> None:
        """Raise ValueError where the run that is here saw other texts or another model."""
        check_same(self.folder, self.record["data"], json.loads(json.dumps(data)), _EXIT_HARMLESS)

    def begin(self, data: Mapping[str, Any]) -> None:
        """Write down which run this is. An older one's exit stays until this run's takes its place."""
        self.checkpoint.unlink(missing_ok=True)
        written = self.record.get("exits", [])
        self._write({"recipe": asdict(self.recipe), "data": dict(data), "exits": written, "finished": False})

    def save_exit(self, made: Exit) -> None:
        """Put an exit in its place. The record comes first, so that whatever a kill leaves there is in it."""
        scratch = made.save(self.folder / f".{FILE_NAME}")
        self._write({**self.record, "exits": [_digest(scratch), *self.record["exits"][:1]]})
        scratch.replace(self.exit)

    def finish(self, found: Mapping[str, Any]) -> None:
        """Write down that the run is at its end, and what it found."""
        self._write({**self.record, "found": dict(found), "finished": True})
        self.checkpoint.unlink(missing_ok=True)

    def _check_unchanged(self) -> None:
        if self.exit.exists() and _digest(self.exit) not in self.record["exits"]:
            raise FileExistsError(f"{self.exit} is not what this command wrote; move it away, or give another output")

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record
        write_record(self.folder / _EXIT_RECORD, record)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
