"""The output folder of an exit's training: which run is in it, and whether another may write there or go on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._files import check_folder
from ..models.exit import FILE_NAME, Exit
from .exit_recipe import ExitRecipe
from .run_record import check_same, read_record, write_record

RECORD = "layerskip-exit.json"
CHECKPOINT, CURVE, TRUNKS = "checkpoint.pt", "curve.png", "trunk"
HARMLESS = ("output", "trunk", "model", "texts", "eval_texts", "prompts", "init_exit")
"""Keys that a resumed run may change: what they stand for is compared itself."""


class ExitOutput:
    """What is in the folder that a recipe writes to: ``exit.safetensors``, the best so far, and how to go on.

    ``layerskip-exit.json`` there says which run it is, what it wrote, and whether it is finished.
    """

    def __init__(self, recipe: ExitRecipe) -> None:
        self.folder, self.recipe = Path(recipe.output), recipe
        self.exit, self.checkpoint, self.curve = (self.folder / name for name in (FILE_NAME, CHECKPOINT, CURVE))
        self.record = read_record(self.folder / RECORD, ("recipe", "data", "exits", "finished"))

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
            raise ValueError(f"there is no run in {self.folder} to resume: it has no {RECORD}")
        check_same(self.folder, self.record["recipe"], json.loads(json.dumps(asdict(self.recipe))), HARMLESS)
        self._check_unchanged()

    def check_same_data(self, data: Mapping[str, Any]) -> None:
        """Raise ValueError where the run that is here saw other texts or another model."""
        check_same(self.folder, self.record["data"], json.loads(json.dumps(data)), HARMLESS)

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
        write_record(self.folder / RECORD, record)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
