"""The output folder of a training run: which run is in it, and whether another may write there or go on with it."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._files import MANIFEST, check_folder, obstacle, remove_written
from .recipe import Recipe
from .run_record import check_same, read_record, write_record

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
