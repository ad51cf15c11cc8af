"""The parts of ``python -m benchmarks.gpu`` that a machine without a card can run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import layerskip_kernels as lk
from benchmarks import gpu, gpu_model

TINY = gpu_model.Shape("tiny", 3, 32, 48, 4, 2, 8, 50, 2, 3)


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.NO_CARD
    assert "No CUDA card" in capsys.readouterr().err


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
    model, token = gpu_model.Model(TINY, "cpu", torch.float32), torch.tensor([7])
    with lk.use_backend("reference"):
        out = model.round(token, model.noise() if drawn else None)
        assert model.lengths.tolist() == [gpu_model.CACHE_LENGTH]
        expected = []
        for _ in range(TINY.draft + 1):
            expected.append(int(model.step(torch.tensor(expected[-1:]) if expected else token)))
            model.lengths += 1
    assert drawn or int(out.next_token) == expected[int(out.accepted)]


def test_every_case_of_sampling_and_decoding_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stop-watch, which needs a card, replaced by one call."""
    monkeypatch.setattr(gpu, "milliseconds", lambda run: run() is not None)
    monkeypatch.setattr(gpu, "BACKENDS", ("cuda", "reference"))
    model = gpu_model.Model(TINY, "cpu", torch.float32)
    results = [*gpu.sampling_cases(model, 1e9), *gpu.decode_cases(model), *gpu.session_cases(model, (1, 3), 2)]
    assert {result.backend for result in results if result.skipped} == {"cuda"}
    measured = [result for result in results if not result.skipped]
    assert len(measured) == 3 + 2 * 4 + 2 * 2 * 2
    assert all(result.value > 0 for result in measured)


def test_a_backend_that_does_not_serve_is_a_line_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "milliseconds", lambda run: float(run().numel()))
    model = gpu_model.Model(TINY, "cpu", torch.float32)
    results = {result.backend: result for result in gpu.forward_cases(model, 1e9)}
    assert "cuda" in results["cuda"].skipped
