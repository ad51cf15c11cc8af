"""The output directory of a training run: which run wrote it, and whether another may write there or resume it."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from .._files import MANIFEST, check_folder, differences, digest_of, lock, obstacle, remove_written, write_atomically
from ..models.exit import FILE_NAME, Exit
from .recipe import ExitRecipe, Recipe, with_new_keys

RECORD = "layerskip-run.json"
RESULTS = ("adapter", "model")
CHECKPOINT, CURVE, HIDDEN_STATES = "checkpoint.pt", "curve.png", "trunk"
WEIGHTS, TOKENIZER = "digest of the weights", "digest of the tokenizer"
ADDED = (WEIGHTS, TOKENIZER)
"""Keys of ``data`` that records of older versions lack."""


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

    A resumed run must have the same recipe, but for the keys in ``CHANGEABLE``, and the same data. The files named in
    the recipe under ``INPUTS`` must not be among those that match ``REPLACED``.
    """

    RECORD: ClassVar[str]
    CHANGEABLE: ClassVar[tuple[str, ...]]
    INPUTS: ClassVar[tuple[str, ...]]
    REPLACED: ClassVar[str]
    results: list[Path]  # of this run at its end
    outputs: list[Path]  # of a run of any recipe
    resumable: bool

    def __init__(self, recipe: Any) -> None:
        self.folder, self.recipe = Path(recipe.output), recipe
        self.record: dict[str, Any] = {}
        path = self.folder / self.RECORD
        if path.exists():
            try:
                self.record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not JSON: {error}") from error
            if not isinstance(self.record, dict) or not {"recipe", "data", "finished"} <= self.record.keys():
                raise ValueError(f"{path} is no record of a training run")

    @property
    def finished(self) -> bool:
        """Whether a run finished here and its results still exist."""
        return bool(self.record.get("finished")) and all(path.exists() for path in self.results)

    def check_new(self, overwrite: bool) -> None:
        """Raise OSError if a new run would replace an older one, files of others, or one of its inputs."""
        check_folder(self.folder)
        self._check_inputs(overwrite)
        older = [path for path in self.outputs if path.exists()]
        if not overwrite:
            otherwise = "give another output, or --overwrite to replace what layerskip wrote there"
            if self.record.get("finished"):
                raise FileExistsError(f"{self.folder} holds a finished run; {otherwise}")
            if self.resumable:
                raise FileExistsError(f"{self.folder} holds an unfinished run; --resume to continue it, or {otherwise}")
            if older:
                raise FileExistsError(f"{older[0]} exists, which this run would write; {otherwise}")
        self._check_unchanged(older)

    def check_resumed(self) -> None:
        """Raise ValueError if there is no run, or a run of another recipe."""
        if not self.record:
            raise ValueError(f"{self.folder} has no {self.RECORD}, so it holds no run of a known recipe to resume")
        self._check_inputs(overwrite=True)
        self._check_same(with_new_keys(self.record["recipe"]), asdict(self.recipe))
        self._check_unchanged(path for path in self.results if path.exists())

    def check_same_data(self, data: Mapping[str, Any]) -> None:
        """Raise ValueError if the run in this directory had other data, or another number of processes."""
        self._check_same(self.record["data"], data)

    def begin(self, data: Mapping[str, Any], **more: Any) -> None:
        """Record a new run; the results of an older one stay until they are replaced."""
        recipe = _as_json(asdict(self.recipe))
        self._write({"recipe": recipe, "data": _as_json(data), **more, "finished": False})

    def _obstacle(self, path: Path) -> str | None:
        return obstacle(path)

    def _check_unchanged(self, paths: Iterable[Path]) -> None:
        for reason in filter(None, map(self._obstacle, paths)):
            raise FileExistsError(f"{reason}, or give another output")

    def _check_inputs(self, overwrite: bool) -> None:
        root = self.folder.resolve()
        for key in self.INPUTS:
            value = getattr(self.recipe, key)
            path = Path(value or "").expanduser().resolve()
            if value is None or not path.exists() or not path.is_relative_to(root):
                continue
            parts = path.relative_to(root).parts[:1]
            if re.fullmatch(self.REPLACED, "".join(parts)):
                where = self.folder.joinpath(*parts)
                raise FileExistsError(f"{key} {value} is in {where}, which this run would replace; give another output")
            if not overwrite:
                raise FileExistsError(
                    f"output {self.folder} holds {key} {value}; give another output, or --overwrite to write beside it"
                )

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        before, now = (
            {key: value for key, value in one.items() if key not in self.CHANGEABLE} for one in (before, _as_json(now))
        )
        changed = differences(before, now, ADDED)
        if changed:
            raise ValueError(f"{self.folder} was trained with another recipe: {changed}")

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record
        write_atomically(self.folder / self.RECORD, json.dumps(record, indent=1).encode())


def locked(recipe: Recipe | ExitRecipe) -> AbstractContextManager[None]:
    """Let no other process train in the output directory of a recipe; BlockingIOError if one does."""
    return lock(Path(recipe.output) / "run")


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
    INPUTS = ("model", "adapter")
    REPLACED = r"adapter|model|checkpoint-.*"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        older = _checkpoint_like(self.folder)
        self.results, self.outputs = results(recipe), [*(self.folder / name for name in RESULTS), *older]
        self.resumable = bool(older)

    def begin(self, data: Mapping[str, Any], **more: Any) -> None:
        for path in checkpoints(self.folder):
            remove_written(path)
        super().begin(data, **more)

    def finish(self) -> None:
        """Record that the results are written, and remove results of an older run that this one does not have."""
        for name in RESULTS:
            if self.folder / name not in self.results and (self.folder / name / MANIFEST).exists():
                remove_written(self.folder / name)
        self._write({**self.record, "finished": True})


class ExitOutput(_OutputDir):
    """The output directory of `layerskip train-exit`: ``exit.safetensors``, the best so far, and a checkpoint.

    The record also has the digests of the exits that were written, and at the end the figures of the best one.
    """

    RECORD = "layerskip-exit.json"
    CHANGEABLE = ("output", "trunk", "model", "texts", "eval_texts", "prompts", "init_exit")  # digests are compared
    INPUTS = ("model", "init_exit")
    REPLACED = ".*"

    def __init__(self, recipe: ExitRecipe) -> None:
        super().__init__(recipe)
        self.exit, self.checkpoint, self.curve = (self.folder / name for name in (FILE_NAME, CHECKPOINT, CURVE))
        self.results, self.resumable = [self.exit], bool(self.record)
        self.outputs = [self.exit, self.checkpoint, self.curve, self.folder / HIDDEN_STATES]

    def begin(self, data: Mapping[str, Any], **more: Any) -> None:
        self.checkpoint.unlink(missing_ok=True)
        super().begin(data, exits=self.record.get("exits", []), **more)

    def save_exit(self, trained: Exit) -> None:
        """Replace the exit. The record comes first, so that it lists the exit that a kill leaves."""
        scratch = trained.save(self.folder / f".{FILE_NAME}")
        self._write({**self.record, "exits": [digest_of(scratch), *self.record["exits"][:1]]})
        scratch.replace(self.exit)

    def finish(self, found: Mapping[str, Any]) -> None:
        """Record the end of the run and the figures of its best exit."""
        self._write({**self.record, "found": dict(found), "finished": True})
        self.checkpoint.unlink(missing_ok=True)

    def _obstacle(self, path: Path) -> str | None:
        if not self.record:
            return f"{path} was not written by this command; move it away"
        if path == self.exit and digest_of(path) not in self.record.get("exits", ()):
            return f"{path} is not what this command wrote; move it away"
        return None
