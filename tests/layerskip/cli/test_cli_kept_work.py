"""What a command has done stays, whatever stops it; and it sees before its work whether the result can be written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import save_tiny
from tiny import UPPER

from layerskip.cli import bench, main
from layerskip.cli.bench import AUTOREGRESSIVE, EARLY_EXIT_ASSISTED, SELF_SPECULATIVE, TRANSFORMERS, Report, Run
from layerskip.models import load
from layerskip.training import batching, read_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["w3 w4", "w5", "w6 w7 w8", "w20 w21", "w22"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("kept") / "base")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


class TestDistill:
    @pytest.fixture
    def command(self, model: Path, prompts: Path, tmp_path: Path) -> list[str]:
        options = ["--max-new-tokens", "6", "--batch-size", "2", "--temperature", "1", "--seed", "7"]
        output = str(tmp_path / "made" / "pairs.jsonl")
        return ["distill", "--model", str(model), "--prompts", str(prompts), "--output", output, *options]

    def test_a_missing_folder_is_made_and_a_result_is_not_written_over(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output, head = tmp_path / "made" / "pairs.jsonl", tmp_path / "heads" / "head.safetensors"
        assert main([*command, "--draft-head", str(head), "--draft-head-size", "30"]) == 0
        assert [pair["prompt"] for pair in read_pairs(output)] == PROMPTS
        assert head.exists()
        assert [path.name for path in output.parent.iterdir()] == ["pairs.jsonl"]
        output.write_text("mine")
        assert main(command) == 2
        assert "pairs.jsonl exists; give another name, or --overwrite to replace it" in errors(capsys)
        output.unlink()
        assert main([*command, "--draft-head", str(head)]) == 2
        assert "head.safetensors exists" in errors(capsys)
        output.write_text("mine")
        assert main([*command, "--overwrite"]) == 0
        assert [pair["prompt"] for pair in read_pairs(output)] == PROMPTS

    def test_an_output_that_cannot_be_is_refused_before_the_model_is_loaded(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command[command.index("--model") + 1] = str(tmp_path)  # where there is no model
        (tmp_path / "made").write_text("a file")
        assert main(command) == 2
        assert "made is a file, so nothing can be written into" in errors(capsys)

    def test_an_interrupt_keeps_the_pairs_and_the_same_command_goes_on(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "made" / "pairs.jsonl"
        assert main(command) == 0
        whole = output.read_bytes()
        output.unlink()
        own_pairs, asked = batching.own_pairs, []

        def interrupted(*args, **kwargs):
            asked.append(list(args[6]))
            for count, pair in enumerate(own_pairs(*args, **kwargs)):
                if count == 2:
                    raise KeyboardInterrupt
                yield pair

        monkeypatch.setattr(batching, "own_pairs", interrupted)
        assert main(command) == 130
        partial = tmp_path / "made" / "pairs.jsonl.partial"
        assert f"2 of 5 pairs are in {partial}; run the same command again to continue" in errors(capsys)
        kept = partial.read_bytes()
        assert kept.count(b"\n") == 3
        assert not output.exists()
        for option, value, difference in (
            ("--seed", "8", "seed was 7 and is 8"),
            ("--max-new-tokens", "5", "max_new_tokens was 6 and is 5"),
            ("--dtype", "float32", "dtype was 'bfloat16' and is 'float32'"),
        ):
            assert main([*command, option, value]) == 2
            assert difference in errors(capsys)
        assert partial.read_bytes() == kept
        with partial.open("ab") as file:
            file.write(b'{"index": 4, "pa')  # as a kill amid a write leaves it
        assert main(command) == 130
        printed = errors(capsys)
        assert f"4 of 5 pairs are in {partial}" in printed
        assert f"layerskip distill: {partial}: skipped line 4, which was cut off" in printed
        assert main(command) == 0
        assert [len(done) for done in asked] == [0, 2, 4]
        assert output.read_bytes() == whole
        assert not partial.exists()

    def test_other_prompts_are_other_work(
        self, command: list[str], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def interrupted(*args, **kwargs):
            yield 0, {"prompt": PROMPTS[0], "completion": "w9", "cut": False}
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(batching, "own_pairs", interrupted)
            assert main(command) == 130
        prompts.write_text("w9\n")
        assert main(command) == 2
        assert "digest of the prompts was " in errors(capsys)
        assert main([*command, "--overwrite"]) == 0
        assert [pair["prompt"] for pair in read_pairs(tmp_path / "made" / "pairs.jsonl")] == ["w9"]

    @pytest.mark.slow
    def test_a_killed_process_leaves_whole_pairs(self, command: list[str], prompts: Path, tmp_path: Path) -> None:
        prompts.write_text("\n".join(f"w{3 + index % 90}" for index in range(400)))
        partial = tmp_path / "made" / "pairs.jsonl.partial"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        running = subprocess.Popen([sys.executable, "-m", "layerskip.cli", *command], env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        limit = time.monotonic() + 120
        while not (partial.exists() and partial.read_bytes().count(b"\n") > 5):
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < limit
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        done = partial.read_bytes().count(b"\n") - 1
        assert 5 <= done < 400
        assert main(command) == 0
        assert len(read_pairs(tmp_path / "made" / "pairs.jsonl")) == 400


class TestBench:
    OPTIONS = ("--max-new-tokens", "8", "--num-speculations", "3", "--dtype", "float32", "--only-ours")

    @pytest.fixture
    def command(self, model: Path, prompts: Path, tmp_path: Path) -> list[str]:
        output = str(tmp_path / "made" / "result")
        return ["bench", "--model", str(model), "--prompts", str(prompts), "--output", output, *self.OPTIONS]

    def test_prompts_that_are_too_long_are_skipped_and_counted(
        self, command: list[str], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        long = " ".join(["w5"] * 249)
        prompts.write_text("\n".join([long, *PROMPTS[:2], long]))
        assert main([*command, "--batch-sizes", "2", "--sweep"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        reason = "a prompt of 249 tokens and max_new_tokens=8 make 257, more than max_seq_len=256"
        assert f"skipped prompt 0: {reason}" in printed
        assert f"skipped prompt 3: {reason}" in printed
        assert "2 of 4 prompts were skipped" in printed
        content = json.loads((tmp_path / "made" / "result.json").read_text())
        assert content["skipped"] == [{"prompt": 0, "reason": reason}, {"prompt": 3, "reason": reason}]
        assert [run["prompt"] for run in content["runs"][SELF_SPECULATIVE]] == [1, 2]
        assert content["complete"] is True
        prompts.write_text(long)
        assert main([*command, "--overwrite"]) == 2
        assert f"none of 1 prompts can be measured; the first: {reason}" in errors(capsys)

    def test_prompts_that_just_fit_are_measured(self, command: list[str], prompts: Path) -> None:
        """Warm-up and the time outside the ops take as many tokens as there is room for."""
        prompts.write_text(" ".join(["w5"] * 248))
        assert main([*command, "--num-speculations", "16"]) == 0

    def test_what_was_measured_is_written_after_each_prompt(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measure, written = bench._measure, []
        result = tmp_path / "made" / "result.json"

        def interrupted(name: str, way: object, prompt: int, *rest: object) -> Run:
            written.append(len(json.loads(result.read_text())["runs"][AUTOREGRESSIVE]) if result.exists() else 0)
            if prompt == 3 and name == SELF_SPECULATIVE:
                raise KeyboardInterrupt
            return measure(name, way, prompt, *rest)

        monkeypatch.setattr(bench, "_measure", interrupted)
        assert main(command) == 130
        assert written == [0, 0, 1, 1, 2, 2, 3, 3]
        assert f"interrupted; 3 runs of each method are in {result}" in errors(capsys)
        content = json.loads(result.read_text())
        assert [len(runs) for runs in content["runs"].values()] == [3, 3]
        assert content["complete"] is False
        assert content["summary"][SELF_SPECULATIVE]["tokens_per_second"] > 0
        assert main(command) == 2
        assert "result.json exists; give another name, or --overwrite" in errors(capsys)
        assert json.loads(result.read_text()) == content

    def test_later_measurements_that_fail_lose_none_of_the_earlier(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bench, "_timed", lambda *args: 1 / 0)
        assert main([*command, "--batch-sizes", "2"]) == 1
        assert "ZeroDivisionError: division by zero (--traceback shows where)" in errors(capsys)
        content = json.loads((tmp_path / "made" / "result.json").read_text())
        assert [len(runs) for runs in content["runs"].values()] == [5, 5]

    def test_a_tiny_run_says_what_was_too_little(
        self, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With all drafts accepted, transformers' early exit brings all four tokens at once; no run ended early."""
        directory = save_tiny(tmp_path / "silent")
        silent, tokenizer = load(directory)
        for layer in silent.model.layers[1:]:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.data *= UPPER["silent"]
        silent.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        command = ["bench", "--model", str(directory), "--prompts", str(prompts), "--limit", "2", "--exit-layer", "1",
                   "--max-new-tokens", "4", "--dtype", "float32", "--output", str(tmp_path / "o")]  # fmt: skip
        assert main(command) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "every run ended at its first token" not in printed
        assert f"{EARLY_EXIT_ASSISTED}: every run gave all its tokens at once (up to 4)" in printed
        assert "take more --max-new-tokens" in printed
        content = json.loads((tmp_path / "o.json").read_text())
        assert content["summary"][EARLY_EXIT_ASSISTED] is None
        assert content["by_task"][""][EARLY_EXIT_ASSISTED] is None
        assert content["summary"][TRANSFORMERS]["tokens_per_second"] > 0
        assert (tmp_path / "o.png").exists()

    def test_runs_that_did_end_at_their_first_token_are_called_that(self, tmp_path: Path) -> None:
        ended, base = [Run(0, 0, 0.0, 0.1)], [Run(0, 0, 0.0, 0.1)]
        report = Report({}, ["a"], {AUTOREGRESSIVE: base, SELF_SPECULATIVE: ended})
        assert report.summary(SELF_SPECULATIVE) is None
        assert "every run ended at its first token" in report.no_speed(SELF_SPECULATIVE)
        assert report.write(tmp_path / "o") == [tmp_path / "o.json"]
        assert json.loads((tmp_path / "o.json").read_text())["summary"] == {
            AUTOREGRESSIVE: None,
            SELF_SPECULATIVE: None,
        }


@pytest.mark.parametrize(
    "command", [["exits", "--output"], ["demo", "--output"], ["bench", "--output"]], ids=lambda command: command[0]
)
def test_no_command_works_for_an_output_that_cannot_be(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([*command, str(tmp_path / "file" / "below" / "it")]) == 2
    assert "file is a file, so nothing can be written into" in errors(capsys)


def test_a_missing_folder_is_made_for_a_picture(model: Path, prompts: Path, tmp_path: Path) -> None:
    options = ["--prompts", str(prompts), "--max-new-tokens", "8", "--dtype", "float32"]
    assert main(["exits", "--model", str(model), *options, "--output", str(tmp_path / "new" / "e")]) == 0
    assert (tmp_path / "new" / "e.png").exists()
