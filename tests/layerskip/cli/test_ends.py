"""What is run with ``python -m`` ends as the ``layerskip`` command does: an error is one line, the code says whose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from layerskip import _ends
from layerskip.training import evaluate

ROOT = Path(__file__).resolve().parents[3]


def ended(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=600, cwd=ROOT, check=False
    )


@pytest.mark.parametrize(
    ("module", "words", "line"),
    [
        ("layerskip.training.evaluate", ["--model", "./nowhere"], "no such directory: nowhere"),
        ("benchmarks.serving", ["--model", "m", "--prompts", "nothing"], "nothing"),
        ("tools.op_clock", ["--model", "./nowhere"], "nowhere"),
        ("tools.session_steps", ["--model", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(module: str, words: list[str], line: str) -> None:
    done = ended(module, *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"python -m {module}: ")
    assert line in done.stderr


@pytest.mark.slow
def test_a_traceback_is_there_for_who_asks() -> None:
    done = ended("layerskip.training.evaluate", "--model", "./nowhere", "--traceback")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "FileNotFoundError: no such directory: nowhere" in done.stderr


@pytest.mark.parametrize(
    ("words", "error", "line"),
    [
        (["--task", "parsng"], ValueError, "did you mean parsing"),
        (["--model", "smollm2-layerskp"], ValueError, "did you mean smollm2-layerskip"),
        (["--split", "tset"], ValueError, "tset"),
        (["--device", "gpu"], ValueError, "gpu"),
    ],
)
def test_wrong_names_are_told_before_a_model_is_loaded(words, error, line, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *args: pytest.fail("loaded"))
    with pytest.raises(error, match=line):
        evaluate.main(words)


def test_a_broken_pipe_of_something_else_is_an_error(capsys) -> None:
    def broken() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    assert _ends.run("this", broken) == 1
    assert capsys.readouterr().err == "this: [Errno 32] Broken pipe\n"


def test_ctrl_c_is_one_line(capsys) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    assert _ends.run("this", stopped) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert _ends.run("this", lambda: None) == 0
