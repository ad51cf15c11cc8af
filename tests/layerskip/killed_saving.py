"""Saves a trained model over an older one, in processes that are killed at one file operation after the other.

``python killed_saving.py FOLDER`` prints a line of JSON for each point: what the folder held after the kill, and what
after another save.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import save_tiny

from layerskip._files import MANIFEST
from layerskip.training.recipe import make_recipe
from layerskip.training.run import make_trainer, save_result

CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree", "ctypes.dlsym"}
EVERY = 9  # of the other operations; all of the above count


class Counter:
    """Counts this process's file operations; the one whose number is ``kill_at`` is its last."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.count, self.changing = kill_at, 0, []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple) -> None:
        if event != "open" and event not in CHANGING:
            return
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if event != "open":
            self.changing.append(self.count)
        self.count += 1


def in_a_process(work: Callable[[], None]) -> int:
    """The signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a save failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (MANIFEST, "NOTES.md")}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # slow, and a kill loses nothing that was written
    pairs = root / "pairs.jsonl"
    pairs.write_text('{"prompt": "w3", "completion": "w4 w5"}\n' * 8)
    output, before = root / "out", root / "before"
    settings = {"model": str(save_tiny(root / "base")), "tasks": [str(pairs)], "output": str(output), "lora_rank": 2}
    recipe = make_recipe({**settings, "exit_layers": [1, 2], "steps": 1})
    trainer = make_trainer(recipe)
    in_a_process(lambda: save_result(trainer, recipe))
    for name in ("adapter", "model"):
        (output / name / "NOTES.md").write_text("mine")
    shutil.copytree(output, before)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora" in name:
                parameter.fill_(0.5)

    def counted() -> None:
        counter = Counter(None)
        save_result(trainer, recipe)
        (root / "points.json").write_text(json.dumps([counter.changing, counter.count]))

    in_a_process(counted)
    new = {name: content(output / name) for name in ("adapter", "model")}
    old = {name: content(before / name) for name in ("adapter", "model")}
    changing, count = json.loads((root / "points.json").read_text())

    def state(name: str) -> str:
        found = content(output / name)
        return "new" if found == new[name] else "old" if found == old[name] else "neither"

    for point in sorted({*changing, *range(0, count, EVERY)}):
        shutil.rmtree(output)
        shutil.copytree(before, output)
        ended = in_a_process(lambda at=point: (Counter(at), save_result(trainer, recipe)))
        found = {name: state(name) for name in ("adapter", "model")}
        notes = all((output / name / "NOTES.md").read_text() == "mine" for name in found)
        in_a_process(lambda: save_result(trainer, recipe))
        then = [state("adapter"), state("model"), sorted(path.name for path in output.iterdir())]
        print(json.dumps({"point": point, "signal": ended, **found, "notes": notes, "then": then}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
