"""Mistakes planted in copies of the project's own kernels are seen."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda_ops import runners

from . import EmulationError, planted, unavailable
from .build import ROOT

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
CUDA = ROOT / "csrc" / "cuda"


def test_a_missing_barrier_in_exit_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the threads: the products read states that other warps have just normed."""
    text = "  __syncthreads();\n  for (int64_t tile = start"
    without = planted("exit_head", "no_barrier", CUDA / "exit_head.cuh", (text, text.split("\n")[1]))
    monkeypatch.setattr(runners, "library", lambda name: without)
    hidden, norm, head = torch.randn(3, 96), torch.ones(96), torch.randn(40, 96)
    for seed in range(4):
        with pytest.raises(EmulationError, match=r"exit_head_kernel<float, float>.*with no barrier between"):
            runners.Emulated(seed).exit_head(hidden, norm, head, 1e-5)


def test_a_write_out_of_bounds_in_accept_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = "next_token[b] = wanted[count]", "next_token[b + 1] = wanted[count]"
    wild = planted("accept_greedy", "wild", CUDA / "accept_greedy.cuh", (inside, outside))
    monkeypatch.setattr(runners, "library", lambda name: wild)
    pattern = r"accept_greedy_kernel.*touches byte 24 of argument 4.*accept_greedy.cuh:\d+"
    with pytest.raises(EmulationError, match=pattern):
        runners.Emulated().accept_greedy(torch.ones(3, 2).long(), torch.ones(3, 3).long(), torch.arange(3))
