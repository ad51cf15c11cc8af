"""The parts of `benchmarks.gpu` that a machine without a GPU can run."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import layerskip_kernels as lk
from benchmarks import gpu

TINY = gpu.Shape("tiny", 3, 32, 48, 4, 2, 8, 50, 2, 3)


def test_a_round_is_what_its_op_gives_and_can_be_repeated() -> None:
    torch.manual_seed(0)
    model = gpu.Model(TINY, "cpu", torch.float32)
    for drafted, noise in ((0, None), (3, None), (3, model.noise())):
        call = gpu.round_call(model, drafted, noise)
        with lk.use_backend("reference"):
            first, second = call(), call()
        assert first.tokens.shape == (1, drafted)
        assert [one.tolist() for one in first] == [one.tolist() for one in second]


def test_every_case_is_timed() -> None:
    model = gpu.Model(TINY, "cpu", torch.float32)
    cases = list(gpu.round_cases(model, lambda what, backend, call, goal: (what, backend)))
    assert len(set(cases)) == 6
    assert gpu.tokens_a_round(0.8, 4) == pytest.approx(3.3616)


def test_the_draft_head_is_a_rounding_of_the_head() -> None:
    head = torch.randn(40, 16)
    small = gpu.DraftHead.of(head, 25)
    torch.testing.assert_close(small.weight * small.scale[:, None], head[:25], atol=0.02, rtol=0)
    assert small.token_map.tolist() == list(range(25))


def test_without_the_sanitizer_it_says_where_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gpu.main(["--sanitize"]) == gpu.NO_SANITIZER
    assert "compute-sanitizer is not on PATH: it comes with the CUDA toolkit" in capsys.readouterr().err


def test_each_tool_runs_over_the_tests(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And what one of them finds is the status, but does not keep the other from running."""
    ran = []

    def run(command: list[str], **options: Any) -> Any:
        ran.append(command)
        assert options["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return SimpleNamespace(returncode=gpu.FOUND if "memcheck" in command else 0)

    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.sanitize() == gpu.FOUND
    assert [command[:3] for command in ran] == [["/opt/compute-sanitizer", "--tool", tool] for tool in gpu.TOOLS]
    assert all("gpu" in command for command in ran)
    assert "memcheck (exit 9) failed" in capsys.readouterr().out
