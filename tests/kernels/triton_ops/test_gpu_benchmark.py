"""The parts of ``python -m benchmarks.gpu`` that a machine without a GPU can run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import layerskip_kernels as lk
from benchmarks import gpu

TINY = gpu.Shape("tiny", 3, 32, 48, 4, 2, 8, 50, 2, 3)


def test_without_a_gpu_it_exits_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.NO_GPU
    assert "No GPU" in capsys.readouterr().err


def test_nothing_is_reported_from_red_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda: 1)
    assert gpu.main(["--output", str(tmp_path / "out.json")]) == gpu.RED_TESTS
    assert "fail" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("drawn", [False, True])
def test_a_round_gives_what_steps_give(drawn: bool) -> None:
    """Greedily what a round emits is what steps of one token emit; its length stays, drawn or not."""
    torch.manual_seed(0)
    model, token = gpu.Model(TINY, "cpu", torch.float32), torch.tensor([7])
    with lk.use_backend("reference"):
        out = model.round(token, model.noise() if drawn else None)
        assert model.lengths.tolist() == [gpu.CACHE_LENGTH]
        expected = []
        for _ in range(TINY.draft + 1):
            expected.append(int(model.step(torch.tensor(expected[-1:]) if expected else token)))
            model.lengths += 1
    assert drawn or int(out.next_token) == expected[int(out.accepted)]


def test_every_case_of_sampling_and_decoding_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stop-watch, which needs a GPU, replaced by one call."""
    monkeypatch.setattr(gpu, "milliseconds", lambda run: run() is not None)
    monkeypatch.setattr(gpu, "BACKENDS", ("cuda", "reference"))
    model = gpu.Model(TINY, "cpu", torch.float32)
    results = [*gpu.sampling_cases(model, 1e9), *gpu.decode_cases(model), *gpu.session_cases(model, (1, 3), 2)]
    assert {result.backend for result in results if result.skipped} == {"cuda"}
    measured = [result for result in results if not result.skipped]
    assert len(measured) == 3 + 2 * 4 + 2 * 2 * 2
    assert all(result.value > 0 for result in measured)


def test_a_backend_that_does_not_serve_is_a_line_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "milliseconds", lambda run: float(run().numel()))
    model = gpu.Model(TINY, "cpu", torch.float32)
    results = {result.backend: result for result in gpu.forward_cases(model, 1e9)}
    assert "cuda" in results["cuda"].skipped


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", "unknown: "), (None, "unknown: ")],
)
def test_the_report_has_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, expected: str
) -> None:
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.driver().startswith(expected)


TINY_OPS = json.dumps({"tiny": [64, 32, 4, 2, 16, 70]}), json.dumps([[3, 8], [2, 16]])


class Told:
    """A worker that says what it was told to."""

    def __init__(self, answers: list[dict[str, float]], asked: list[int], number: int) -> None:
        self.cases, self._answers, self._asked, self._number = ["one", "two"], iter(answers), asked, number

    def ask(self, case: str) -> dict[str, float]:
        self._asked.append(self._number)
        return next(self._answers)

    def close(self) -> None:
        self._asked.append(-1)


def told(monkeypatch: pytest.MonkeyPatch, times: list[list[float]], along: float = 1.0) -> list[int]:
    """Workers with these times; what they were asked is noted."""
    asked: list[int] = []
    answers = [
        [{"microseconds": time, "norm": 5.0, "along": along if index else 1.0} for time in own]
        for index, own in enumerate(times)
    ]
    made = iter([Told(own, asked, index) for index, own in enumerate(answers)])
    monkeypatch.setattr(gpu, "Worker", lambda *args: next(made))
    monkeypatch.setattr(gpu, "TURNS", 3)
    return asked


def test_two_versions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = told(monkeypatch, [[8.0, 9.0, 70.0, 4.0, 4.0, 4.0], [2.0, 3.0, 1.0, 8.0, 8.0, 1.0]])
    rows = list(gpu.compare(gpu.ROOT, gpu.ROOT))
    assert asked == [0, 1] * 6 + [-1, -1]
    assert rows == [
        {"what": "one", "before_us": 9.0, "after_us": 2.0, "ratio": 4.5, "same": True},
        {"what": "two", "before_us": 4.0, "after_us": 8.0, "ratio": 0.5, "same": True},
    ]


@pytest.mark.parametrize(("along", "same"), [(1.09, True), (1.11, False), (float("nan"), False)])
def test_different_versions_are_reported(monkeypatch: pytest.MonkeyPatch, along: float, same: bool) -> None:
    told(monkeypatch, [[1.0] * 6] * 2, along)
    assert [row["same"] for row in gpu.compare(gpu.ROOT, gpu.ROOT)] == [same, same]


def test_a_worker_times_every_case() -> None:
    worker = gpu.Worker(gpu.ROOT, "cpu", "reference", TINY_OPS)
    named = [f"tiny {op} R={rows}" for rows in (1, 5) for op in ("linear", "swiglu", "exit_head")]
    named += [f"tiny verify_attention, {length} tokens of {capacity}" for length, capacity in ((3, 8), (2, 16))]
    assert worker.cases == named
    answers = [worker.ask(case) for case in named]
    worker.close()
    assert all(one["microseconds"] > 0 and 0 < abs(one["along"]) < one["norm"] for one in answers)
    assert len({one["norm"] for one in answers}) == len(named)


def test_without_an_older_version_the_report_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = gpu.before_and_after("no-such-commit")
    assert found["version"] == "no-such-commit"
    assert found["skipped"].startswith("no commit no-such-commit here: ")
    assert "an older version is not measured" in capsys.readouterr().err
    with gpu.checkout(str(tmp_path)) as folder:
        assert folder == tmp_path
    with pytest.raises(gpu.OlderVersionError, match=f"in {tmp_path} Python finds the package "):
        gpu.Worker(tmp_path, "cpu", "reference", TINY_OPS)
    with pytest.raises(gpu.OlderVersionError, match="a worker ended with status 1"):
        gpu.Worker(gpu.ROOT, "cpu", "no-such-backend")
