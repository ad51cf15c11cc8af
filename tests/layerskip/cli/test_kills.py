"""Commands that are killed at random moments: they resume or start over, and lose nothing of the user's."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from exit_training import arguments, save_model_and_texts
from helpers import save_tiny

from layerskip.cli import main

KILLS = int(os.environ.get("LAYERSKIP_KILLS", "2"))  # of each command
NOTES = "NOTES.md"
pytestmark = [pytest.mark.slow, pytest.mark.time_limit(300 + 60 * KILLS)]


class Command(NamedTuple):
    """What to run in a folder, again after a kill, and the results, which are equal unless they are measured."""

    argv: list[str]
    again: list[str]
    results: tuple[str, ...]
    measured: bool = False


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models, prompts and pairs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the processes are forks
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base", intermediate_size=96)
    (folder / "exit").mkdir()
    save_model_and_texts(folder / "exit")
    (folder / "prompts.txt").write_text("".join(f"w{3 + index} w{40 + index}\n" for index in range(30)))
    (folder / "pairs.jsonl").write_text('{"prompt": "w3 w4", "completion": "w5 w6"}\n' * 24)
    yield folder
    torch.set_num_threads(threads)


def commands(made: Path, output: Path) -> dict[str, Command]:
    prompts, model = ["--prompts", str(made / "prompts.txt")], str(made / "base")
    file, directory, new = str(output / "file"), str(output / "directory"), ["--max-new-tokens", "6"]
    bench = ["bench", "--model", model, *prompts, *new, "--limit", "12", "--only-ours", "--output", file]
    tune = ["tune", model, *prompts, *new, "--limit", "8", "--output", file]
    distill = ["distill", "--model", model, *prompts, *new, "--batch-size", "4", "--output", file]
    quantize = ["quantize", model, "--weights", "int8", "--windows", "0", "--output", directory]
    export = ["export", "--model", model, "--exit-layer", "2", "--output", directory, "--overwrite"]
    recipe = {"model": model, "tasks": [str(made / "pairs.jsonl")], "output": directory, "steps": 6, "save_every": 2,
              "batch_size": 4, "exit_layers": [1, 2], "lora_rank": 2}  # fmt: skip
    (output / "recipe.yaml").write_text(json.dumps(recipe))
    train = ["train", str(output / "recipe.yaml"), "--device", "cpu"]
    train_exit = arguments(made / "exit", output / "directory")
    return {
        "bench": Command(bench, [*bench, "--overwrite"], ("file.json",), measured=True),
        "tune": Command(tune, [*tune, "--overwrite"], ("file",), measured=True),
        "distill": Command(distill, [*distill, "--overwrite"], ("file",)),
        "quantize": Command(quantize, [*quantize, "--overwrite"], ("directory/model.safetensors",)),
        "export": Command(export, export, ("directory/model.safetensors",)),
        "train": Command(train, [*train, "--resume"], ("directory/model/model.safetensors",)),
        "train-exit": Command(train_exit, [*train_exit, "--resume"], ("directory/exit.safetensors",)),
    }


def in_a_process(argv: list[str], output: Path, seconds: float | None = None) -> int:
    """Run a command, and kill it after some seconds; the exit code, or the negated signal."""
    child = os.fork()
    if child == 0:
        log = os.open(output.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (pytest's own would be written in the parent)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = 70
        try:
            code = main(argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["bench", "tune", "distill", "quantize", "export", "train", "train-exit"])
def test_a_killed_command_resumes_or_starts_over(name: str, made: Path, output: Path) -> None:
    (output / NOTES).write_text("mine")
    command = commands(made, output)[name]
    started = time.monotonic()
    assert in_a_process(command.argv, output) == 0, (output.parent / "log").read_text()
    seconds = time.monotonic() - started
    expected = [(output / path).read_bytes() for path in command.results]
    has_directory = (output / "directory").is_dir()
    if has_directory:
        (output / "directory" / NOTES).write_text("mine")
    whole = output.parent / "whole"
    output.rename(whole)
    draw, ended = random.Random(name), {"new": 0, "again": 0, "killed": 0}
    for kill in range(KILLS):
        replaces = name in ("export", "quantize") and kill % 2 == 1  # of an older output, in which there are notes
        if replaces:
            shutil.copytree(whole, output)
        else:
            output.mkdir()
            (output / NOTES).write_text("mine")
            commands(made, output)
        argv = command.again if replaces else command.argv
        ended["killed"] += in_a_process(argv, output, draw.uniform(0, 1.05 * seconds)) == -signal.SIGKILL
        assert (output / NOTES).read_text() == "mine"
        code = in_a_process(argv, output)
        ended["new" if code == 0 else "again"] += 1
        if code:
            assert code == 2, (output.parent / "log").read_text()
            refusal = " ".join((output.parent / "log").read_text().split())
            assert any(word in refusal for word in ("--overwrite", "--resume")), refusal
            assert in_a_process(command.again, output) == 0, (output.parent / "log").read_text()
        found = [(output / path).read_bytes() for path in command.results]
        if command.measured:
            assert all(json.loads(content) for content in found)
        else:
            assert found == expected
        assert (output / NOTES).read_text() == "mine"
        if replaces:
            assert (output / "directory" / NOTES).read_text() == "mine"
        leftovers = {path.name for path in output.rglob(".*")} | {path.name for path in output.glob("*.partial")}
        assert not [one for one in leftovers if one.endswith((".lock", ".partial", ".unfinished", ".removed"))]
        shutil.rmtree(output)
    print(f"{name}: {seconds:.1f} s, {KILLS} kills, {ended}", file=sys.__stderr__)
