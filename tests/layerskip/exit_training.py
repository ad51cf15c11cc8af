"""Small runs of `layerskip train-exit`, in a test's own process or in others, as a script with the options as JSON."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from helpers import save_tiny

from layerskip.cli import main
from layerskip.training import hidden_state_cache
from layerskip.training.exit_trainer import ExitTrainer
from layerskip.training.recipe import ExitRecipe


def save_model_and_texts(folder: Path) -> Path:
    """A tiny model in ``model``, and ``texts.jsonl``."""
    save_tiny(folder / "model", "smollm2")
    source = torch.Generator().manual_seed(0)
    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(40):
            words = [f"w{number}" for number in torch.randint(20, 60, (14,), generator=source).tolist()]
            file.write(json.dumps({"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])}) + "\n")
    return folder


def recipe(saved: Path, output: Path, **changes: Any) -> ExitRecipe:
    """Of a run of 12 steps with what `save_model_and_texts` has made."""
    settings = {
        "model": str(saved / "model"), "texts": [str(saved / "texts.jsonl")], "exit_layer": 1, "draft_tokens": 0,
        "dtype": "float32", "steps": 12, "eval_every": 4, "batch_tokens": 64, "warmup": 2, "output": str(output),
    }  # fmt: skip
    return ExitRecipe(**{**settings, **changes})


def arguments(saved: Path, output: Path, *more: str, **changes: Any) -> list[str]:
    """Of the command, for such a recipe, which lies beside the output."""
    path = output.parent / f"{output.name}.yaml"
    path.write_text(json.dumps(vars(recipe(saved, output, **changes))))  # JSON is YAML
    return ["train-exit", str(path), "--device", "cpu", *more]


def stopping(at: int | None, step: Any = ExitTrainer._step) -> Any:
    """A step that is interrupted when it is the one of that number."""

    def interrupted(self: ExitTrainer, batch: Any) -> float:
        if self.state.step == at:
            raise KeyboardInterrupt
        return step(self, batch)

    return interrupted


def watched(runs: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """The command several times, with ``argv``, and interrupted at step ``stop``; what this process saw of it all.

    The exit ``codes``, what was ``printed``, the texts of its part of every step (``shares``), how many were made in
    each part that went ``through`` the model, and which files it ``opened`` for writing below ``folder``.
    """
    seen: dict[str, Any] = {"codes": [], "shares": [], "through": [], "opened": []}

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).startswith(folder) and args[2] & (os.O_WRONLY | os.O_RDWR):
            seen["opened"].append(str(args[0]))

    def telling(step: Any, key: str, told: Any = list) -> Any:
        return lambda self, items: seen[key].append(told(items)) or step(self, items)

    sys.addaudithook(audit)
    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        patch.object(PartialState, "destroy_process_group"),  # torchrun's store lets processes meet only once
        patch.object(hidden_state_cache, "PASS_TOKENS", 60),  # both have several parts, not in pairs
        patch.object(hidden_state_cache, "BATCH", 2),
        patch.object(
            hidden_state_cache.TextCache, "_compute", telling(hidden_state_cache.TextCache._compute, "through", len)
        ),
        patch.object(
            hidden_state_cache.GeneratedTextCache,
            "_compute",
            telling(hidden_state_cache.GeneratedTextCache._compute, "through", len),
        ),
        patch.object(ExitTrainer, "_backward", telling(ExitTrainer._backward, "shares", hidden_state_cache.own_share)),
    ):
        for run in runs:
            with patch.object(ExitTrainer, "_step", stopping(run.get("stop"))):
                seen["codes"].append(main(run["argv"]))
    return {**seen, "printed": printed.getvalue()}


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    result = watched(**options)
    Path(options["folder"], f"rank-{PartialState().process_index}.json").write_text(json.dumps(result))
    PartialState().destroy_process_group()
