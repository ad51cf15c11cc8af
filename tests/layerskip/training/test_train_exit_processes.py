"""`layerskip train-exit` in two processes, which talk by gloo: what one alone does, but for the order of sums."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exit_training import arguments, save_model_and_texts, watched
from launched import launch
from safetensors.torch import load_file

from layerskip.cli import main

SCRIPT = Path(__file__).parents[1].joinpath("exit_training.py")
pytestmark = pytest.mark.xdist_group("train_exit_processes")  # both processes run once
# Sums in another order, and AdamW divides by their size: of losses of order 3, and of weights, which are saved in bf16.
TOLERANCES = {"losses": 2e-4, "weights": 2**-7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_and_texts(tmp_path_factory.mktemp("processes"))


def runs_of(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Of given texts, and of some that the model writes."""
    texts = {"prompts": [str(folder / "texts.jsonl")], "written": 9, "new_tokens": 8, "head_rank": 2}
    return [{"argv": arguments(folder, folder / name, **texts)} for name in names]


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes saw of a run, and of one that was interrupted and gone on with."""
    whole, stopped = runs_of(folder, "whole", "stopped")
    resumed = {"argv": [*stopped["argv"], "--resume"]}
    runs = [whole, {**stopped, "stop": 6}, resumed]
    ended = launch(SCRIPT, 2, runs=runs, folder=str(folder))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def found(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "layerskip-exit.json").read_text())["found"]["held out"]


def test_a_resumed_run_of_two_processes_is_the_uninterrupted_one(folder: Path, two: list[dict[str, Any]]) -> None:
    assert [seen["codes"] for seen in two] == [[0, 130, 0]] * 2
    ours, theirs = (load_file(folder / name / "exit.safetensors") for name in ("stopped", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert found(folder, "stopped") == found(folder, "whole")


def test_only_the_first_process_prints_and_writes(two: list[dict[str, Any]]) -> None:
    first, second = two
    assert "wrote the exit of step" in first["printed"]
    assert any("checkpoint.pt" in path for path in first["opened"])
    assert second["printed"] == ""
    assert second["opened"] == []


def test_two_processes_do_what_one_does(folder: Path, two: list[dict[str, Any]]) -> None:
    """The same batches, of which each has a part; the same texts on the disk; the same exit, but for rounding."""
    alone = watched(runs_of(folder, "alone"), str(folder))
    assert alone["codes"] == [0]
    steps = len(alone["shares"])
    for mine, *parts in zip(alone["shares"], *(seen["shares"][:steps] for seen in two), strict=True):
        assert parts == [mine[0::2], mine[1::2]]
    expected = [alone["through"][0::2], alone["through"][1::2]]
    assert [seen["through"][: len(part)] for seen, part in zip(two, expected, strict=True)] == expected
    kept = [sorted((folder / name / "trunk").rglob("*")) for name in ("alone", "whole")]
    assert len(kept[0]) > 6
    for one, other in zip(*kept, strict=True):
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), one
    losses = [re.findall(r"step \d+  loss ([\d.]+)", seen["printed"])[:3] for seen in (alone, two[0])]
    assert len(losses[0]) == 3
    assert [*map(float, losses[0])] == pytest.approx([*map(float, losses[1])], abs=TOLERANCES["losses"])
    for name, tensor in load_file(folder / "alone" / "exit.safetensors").items():
        other = load_file(folder / "whole" / "exit.safetensors")[name]
        torch.testing.assert_close(other, tensor, rtol=TOLERANCES["weights"], atol=1e-4)
    for key, value in found(folder, "alone")["held out"].items():
        assert found(folder, "whole")["held out"][key] == pytest.approx(value, abs=TOLERANCES["losses"])


def test_another_number_of_processes_is_refused(folder: Path, two: list[dict[str, Any]], capsys: Any) -> None:
    path = folder / "whole" / "layerskip-exit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": False}))
    assert main([*runs_of(folder, "whole")[0]["argv"], "--resume"]) == 2
    assert "number of processes was 2 and is 1" in capsys.readouterr().err.replace("\n", " ")


def test_one_card_for_several_processes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = runs_of(folder, "nowhere")[0]["argv"]
    assert main([*argv, "--device", "cuda:1"]) == 2
    assert "--device cuda:1 is one GPU, under torchrun every process has its own" in capsys.readouterr().err
