"""``--device``: what it stands for, that models go there, that training takes one; on a GPU that all commands run."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny
from rich.console import Console

from layerskip import devices
from layerskip.cli import main, options
from layerskip.cli.arguments import COMMANDS, parse
from layerskip.cli.bench import AUTOREGRESSIVE, SELF_SPECULATIVE, Report, Run
from layerskip.devices import ReadBandwidth
from layerskip.training import run as runs
from layerskip.training.recipe import Recipe

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Torch says that there are two; gives which one is current, in the end of a list."""
    current = [FIRST]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {torch.device(device).index}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(torch.device(device)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1].index)
    return current


class TestFind:
    def test_without_a_gpu(self, no_gpu: None) -> None:
        assert devices.find("auto") == devices.find("cpu") == CPU
        for name in ("cuda", "cuda:0", "cuda:3"):
            with pytest.raises(ValueError, match=rf"the device {name} is not available: torch .* sees no GPU"):
                devices.find(name)

    def test_with_two(self, two_gpus: list[torch.device]) -> None:
        assert devices.find("cpu") == CPU
        assert devices.find("auto") == devices.find("cuda") == FIRST
        assert devices.find("cuda:1") == SECOND
        with pytest.raises(
            ValueError, match=r"the device cuda:2 is not available: .* sees cuda:0 \(GPU 0\), cuda:1 \(GP"
        ):
            devices.find("cuda:2")


class TestOption:
    def test_every_command_that_computes_has_it(self) -> None:
        needed = {"distill": ["--output", "x"], "export": ["--output", "x", "--exit-layer", "2"], "tune": ["any"],
                  "serve": ["any"], "eval": ["spec"],
                  "quantize": ["any", "--weights", "int8", "--output", "x"]}  # fmt: skip
        for command in COMMANDS.keys() - {"env", "report"}:
            assert parse([command, *needed.get(command, [])]).device == "auto"
            assert parse([command, "--device", "cuda:1", *needed.get(command, [])]).device == "cuda:1"

    @pytest.mark.parametrize(
        ("name", "device", "told"), [("auto", FIRST, "computing on cuda:0 (GPU 0)\n"), ("cuda:1", SECOND, "")]
    )
    def test_models_go_there_and_auto_says_where(
        self, two_gpus: list[torch.device], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        name: str, device: torch.device, told: str,
    ) -> None:  # fmt: skip
        class Model:
            def to(self, device: torch.device) -> torch.device:
                return device

        monkeypatch.setattr(options.models, "load", lambda *args: (Model(), None))
        args = argparse.Namespace(model="any", dtype="float32", device=name, threads=None)
        for _ in range(2):  # which is told once
            assert options.load(args, Console(file=io.StringIO())) == (device, None)
        assert args.device == device
        assert capsys.readouterr().err == told

    def test_a_gpu_not_available(self, no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = str(save_tiny(tmp_path / "model"))
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "w3", "completion": "w4"}\n')
        recipe = [
            "--set",
            f"model={model}",
            "--set",
            f"tasks=[{tmp_path}/pairs.jsonl]",
            "--set",
            f"output={tmp_path}/o",
        ]
        for arguments in (["generate", "w3", "--model", model], ["train", *recipe]):
            assert main([*arguments, "--device", "cuda:1"]) == 2
            assert "the device cuda:1 is not available" in capsys.readouterr().err


class TestTraining:
    def arguments(self, tmp_path: Path, device: torch.device) -> Any:
        return runs.training_arguments(Recipe(precision="fp32", output=str(tmp_path)), 3, device)

    def test_on_the_cpu(self, tmp_path: Path) -> None:
        arguments = self.arguments(tmp_path, CPU)
        assert (arguments.use_cpu, arguments.device, arguments.n_gpu) == (True, CPU, 0)

    @pytest.mark.parametrize("device", [FIRST, SECOND])
    def test_one_gpu_of_two(
        self, two_gpus: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
    ) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        arguments = self.arguments(tmp_path, device)
        assert not arguments.use_cpu
        assert (two_gpus[-1], arguments.n_gpu) == (device, 1)

    def test_under_torchrun_no_gpu_is_named(
        self, two_gpus: list[torch.device], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("WORLD_SIZE", "2")
        (tmp_path / "pairs.jsonl").touch()
        (tmp_path / "model").mkdir()
        recipe = [f"tasks=[{tmp_path}/pairs.jsonl]", f"model={tmp_path}/model", f"output={tmp_path}/out"]
        assert main(["train", *(word for pair in recipe for word in ("--set", pair)), "--device", "cuda:1"]) == 2
        assert "--device cuda:1 is one GPU, under torchrun every process has its own" in capsys.readouterr().err


def test_a_report_of_a_gpu_names_it() -> None:
    settings = {"model": "m", "dtype": "bfloat16", "device": "cuda:1", "threads": 2, "layers": 4, "exit_layer": 1,
                "num_speculations": 4, "draft_threshold": 0.0, "draft_source": "exit"}  # fmt: skip
    runs = [Run(0, 10, 1.0, 0.1)]
    console = Console(file=io.StringIO(), width=200)
    Report(settings, ["a"], {AUTOREGRESSIVE: runs, SELF_SPECULATIVE: runs}, bandwidth=2000.0).show(console)
    printed = console.file.getvalue()
    assert "m, bfloat16, cuda:1, E=1 of 4" in printed
    assert "outside the ops" not in printed, "which the clock of a CPU does not tell"


def test_the_bandwidth_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerskip.devices.BUFFER_BYTES", 2**16)
    assert ReadBandwidth(torch.device("meta"))._buffer.device.type == "meta"
    memory = ReadBandwidth(CPU)
    memory.sample()
    assert memory.median == 2**16 / memory._seconds[0] / 1e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestGPU:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return str(save_tiny(tmp_path_factory.mktemp("gpu") / "model"))

    @pytest.fixture
    def common(self, model: str, tmp_path: Path) -> list[str]:
        (tmp_path / "prompts.txt").write_text("w5 w8\nw7\n")
        prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "8"]
        return ["--model", model, *prompts, "--dtype", "float32", "--device", "cuda"]

    def test_generate(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["generate", "w5 w8", "--model", model, "--max-new-tokens", "8", "--dtype", "float32"]
        printed = []
        for device in ("cuda", "auto"):
            assert main([*command, "--device", device]) == 0
            printed.append(capsys.readouterr())
        assert printed[0].out == printed[1].out
        assert "computing on cuda:0" in printed[1].err

    def test_bench(self, common: list[str], tmp_path: Path) -> None:
        options = ["--batch-sizes", "2", "--sweep", "--output", str(tmp_path / "bench")]
        assert main(["bench", *common, *options]) == 0
        content = json.loads((tmp_path / "bench.json").read_text())
        assert content["settings"]["device"] == "cuda:0"

    def test_correctness(self, common: list[str]) -> None:
        assert main(["correctness", *common]) == 0

    def test_exits(self, common: list[str], tmp_path: Path) -> None:
        assert main(["exits", *common, "--output", str(tmp_path / "exits")]) == 0
        assert (tmp_path / "exits.png").exists()

    def test_distill_and_train(self, common: list[str], model: str, tmp_path: Path) -> None:
        pairs = tmp_path / "pairs.jsonl"
        assert main(["distill", *common, "--output", str(pairs)]) == 0
        recipe = [f"model={model}", f"tasks=[{pairs}]", "steps=2", "exit_layers=[1, 2]", f"output={tmp_path / 'out'}"]
        assert main(["train", "--device", "cuda", *(word for pair in recipe for word in ("--set", pair))]) == 0
        assert (tmp_path / "out/model/config.json").exists()
