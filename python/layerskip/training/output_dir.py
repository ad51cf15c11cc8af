"""The output directory of a training run: which run wrote it, and whether another may write there or resume it."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from .._files import MANIFEST, check_folder, differences, digest_of, obstacle, remove_written, write_atomically
from ..models.exit import FILE_NAME, Exit
from .recipe import ExitRecipe, Recipe, with_new_keys

RECORD = "layerskip-run.json"
RESULTS = ("adapter", "model")
CHECKPOINT, CURVE, HIDDEN_STATES = "checkpoint.pt", "curve.png", "trunk"
OTHERWISE = "give another output, or --overwrite to replace"


def results(recipe: Recipe) -> list[Path]:
    """The directories that a run writes at its end; the model is the last."""
    return [Path(recipe.output) / name for name in RESULTS if name == "model" or recipe.method == "lora"]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below ``folder`` that this library wrote, oldest first."""
    return [path for path in _checkpoint_like(folder) if (path / MANIFEST).exists()]


def last_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints(folder)), None)


def _checkpoint_like(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def digest(pairs: Sequence[Mapping[str, list[int]]]) -> str:
    """Digest of all tokens and labels, in order."""
    sha256 = hashlib.sha256()
    for pair in pairs:
        for key in ("input_ids", "labels"):
            sha256.update(array("q", [len(pair[key]), *pair[key]]).tobytes())
    return sha256.hexdigest()


class _OutputDir:
    """A directory with a record of its run: the recipe, the data that the steps depend on, whether it is finished.

    A resumed run must have the same recipe, but for the keys in ``CHANGEABLE``, and the same data.
    """

    RECORD: ClassVar[str]
    KEYS: ClassVar[tuple[str, ...]] = ("recipe", "data", "finished")
    CHANGEABLE: ClassVar[tuple[str, ...]]

    def __init__(self, recipe: Any) -> None:
        self.folder, self.recipe = Path(recipe.output), recipe
        self.record: dict[str, Any] = {}
        path = self.folder / self.RECORD
        if path.exists():
            try:
                self.record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not JSON: {error}") from error
            if not isinstance(self.record, dict) or not set(self.KEYS) <= self.record.keys():
                raise ValueError(f"{path} is no record of a training run")

    def check_same_data(self, data: Mapping[str, Any]) -> None:
        """Raise ValueError if the run in this directory had other data, or another number of processes."""
        self._check_same(self.record["data"], data)

    def _check_same_recipe(self) -> None:
        self._check_same(with_new_keys(self.record["recipe"]), asdict(self.recipe))

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        before, now = (
            {key: value for key, value in one.items() if key not in self.CHANGEABLE} for one in (before, _as_json(now))
        )
        changed = differences(before, now)
        if changed:
            raise ValueError(f"{self.folder} was trained with another recipe: {changed}")

    def _begin(self, data: Mapping[str, Any], **more: Any) -> None:
        recipe = _as_json(asdict(self.recipe))
        self._write({"recipe": recipe, "data": _as_json(data), **more, "finished": False})

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record
        write_atomically(self.folder / self.RECORD, json.dumps(record, indent=1).encode())


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as read back from JSON, nested keys as ``outer.inner``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if key in ("replay", "layer_dropout") else {}
        flat |= {f"{key}.{name}": item for name, item in inner.items()} if inner else {key: value}
    read: dict[str, Any] = json.loads(json.dumps(flat))
    return read


class Output(_OutputDir):
    """The output directory of `layerskip train`: checkpoints, ``adapter`` and ``model``."""

    RECORD = RECORD
    CHANGEABLE = ("output", "log_every", "save_every", "eval_split", "eval_examples")

    @property
    def results(self) -> list[Path]:
        return results(self.recipe)

    @property
    def finished(self) -> bool:
        """Whether a run finished here and its results still exist."""
        return bool(self.record.get("finished")) and all(path.exists() for path in self.results)

    def check_new(self, overwrite: bool) -> None:
        """Raise OSError if a new run would replace an older one, files of others, or its own model."""
        check_folder(self.folder)
        self._check_inputs(overwrite)
        older = [self.folder / name for name in RESULTS if (self.folder / name).exists()]
        if not overwrite:
            written = f"{OTHERWISE} what layerskip wrote there"
            if self.record.get("finished"):
                raise FileExistsError(f"{self.folder} holds a finished run; {written}")
            if _checkpoint_like(self.folder):
                raise FileExistsError(
                    f"{self.folder} holds checkpoints of a run; --resume to continue it, or {written}"
                )
            if older:
                raise FileExistsError(f"{older[0]} exists, which this run would write; {written}")
        for path in (*older, *_checkpoint_like(self.folder)):
            reason = obstacle(path)
            if reason is not None:
                raise FileExistsError(f"{reason}, or give another output")

    def check_resumed(self) -> Path | None:
        """The checkpoint to resume from, None only for a finished run; ValueError if it is of another recipe."""
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is None and not self.finished:
            raise ValueError(f"there is no whole checkpoint in {self.folder} to resume from")
        if not self.record:
            raise ValueError(f"{self.folder} has no {RECORD}, so the recipe of its checkpoints is unknown")
        self._check_inputs(overwrite=True)
        self._check_same_recipe()
        return checkpoint

    def begin(self, data: Mapping[str, Any]) -> None:
        """Remove the checkpoints of an older run and record the new one; older results stay until they are replaced."""
        for path in checkpoints(self.folder):
            remove_written(path)
        self._begin(data)

    def finish(self) -> None:
        """Record that the results are written, and remove results of an older run that this one does not have."""
        for name in RESULTS:
            if self.folder / name not in self.results and (self.folder / name / MANIFEST).exists():
                remove_written(self.folder / name)
        self._write({**self.record, "finished": True})

    def _check_inputs(self, overwrite: bool) -> None:
        """Raise FileExistsError if the run would write where its model or adapter lies."""
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


class ExitOutput(_OutputDir):
    """The output directory of `layerskip train-exit`: ``exit.safetensors``, the best so far, and a checkpoint.

    The record also has the digests of the exits that were written, and at the end the figures of the best one.
    """

    RECORD = "layerskip-exit.json"
    KEYS = ("recipe", "data", "exits", "finished")
    CHANGEABLE = ("output", "trunk", "model", "texts", "eval_texts", "prompts", "init_exit")  # digests are compared

    def __init__(self, recipe: ExitRecipe) -> None:
        super().__init__(recipe)
        self.exit, self.checkpoint, self.curve = (self.folder / name for name in (FILE_NAME, CHECKPOINT, CURVE))

    @property
    def finished(self) -> bool:
        """Whether a run finished here and its exit still exists."""
        return bool(self.record.get("finished")) and self.exit.exists()

    def check_new(self, overwrite: bool) -> None:
        """Raise OSError if a new run would replace an older one, files of others, or its own model."""
        check_folder(self.folder)
        model = Path(self.recipe.model).expanduser()
        if model.exists() and model.resolve().is_relative_to(self.folder.resolve()):
            raise FileExistsError(f"model {model} is in the output {self.folder}; give another output")
        if not self.record:
            for path in (self.exit, self.checkpoint, self.curve, self.folder / HIDDEN_STATES):
                if path.exists():
                    raise FileExistsError(
                        f"{path} was not written by this command; move it away, or give another output"
                    )
            return
        self._check_unchanged()
        if not overwrite:
            if self.record["finished"]:
                raise FileExistsError(f"{self.folder} holds a finished run; {OTHERWISE} it")
            raise FileExistsError(f"{self.folder} holds an unfinished run; --resume to continue it, or {OTHERWISE} it")

    def check_resumed(self) -> None:
        """Raise ValueError if there is no run, or a run of another recipe."""
        if not self.record:
            raise ValueError(f"there is no run in {self.folder} to resume: it has no {self.RECORD}")
        self._check_same_recipe()
        self._check_unchanged()

    def begin(self, data: Mapping[str, Any]) -> None:
        """Record the new run; the exit of an older one stays until it is replaced."""
        self.checkpoint.unlink(missing_ok=True)
        self._begin(data, exits=self.record.get("exits", []))

    def save_exit(self, trained: Exit) -> None:
        """Replace the exit. The record comes first, so that it lists the exit that a kill leaves."""
        scratch = trained.save(self.folder / f".{FILE_NAME}")
        self._write({**self.record, "exits": [digest_of(scratch), *self.record["exits"][:1]]})
        scratch.replace(self.exit)

    def finish(self, found: Mapping[str, Any]) -> None:
        """Record the end of the run and the figures of its best exit."""
        self._write({**self.record, "found": dict(found), "finished": True})
        self.checkpoint.unlink(missing_ok=True)

    def _check_unchanged(self) -> None:
        if self.exit.exists() and digest_of(self.exit) not in self.record["exits"]:
            raise FileExistsError(f"{self.exit} is not what this command wrote; move it away, or give another output")
