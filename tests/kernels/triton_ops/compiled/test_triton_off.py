"""Where triton's interpreter is off and there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import layerskip_kernels as lk
from layerskip_kernels.schemas import bind
from layerskip_kernels.triton import speculative_round
from tools import triton_report as report

REPORT = Path(__file__).parents[4] / "benchmarks/results/triton_kernels.md"


def test_cpu_tensors_are_not_served() -> None:
    with lk.use_backend("triton"), pytest.raises(lk.BackendError, match="TRITON_INTERPRET=1 was not set"):
        lk.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


def test_the_report_lists_every_launch() -> None:
    """Of names, not of figures: those change with triton's version."""
    text = REPORT.read_text(encoding="utf-8")
    for launch in report.launches(report.LLAMA_1B, torch.bfloat16):
        assert f"| {launch.name} |" in text, f"run make triton-report: {launch.name} is not in {REPORT}"


@pytest.mark.parametrize("num_draft_layers", [0, 1])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_round_looks_at_no_value(sampled: bool, num_draft_layers: int) -> None:
    """Tensors on the device "meta" have none, so a look raises; the launches of a round, which a graph holds, counted.

    A layer takes 10 here: its down projection is split. A head takes 3, the end of a draft's step 1, accept_greedy 1,
    accept_sampled 4.
    """
    shape, layers, exits, num_speculations = report.LLAMA_1B, 16, 4, 6

    def empty(*sizes: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    token, seed = (empty(2, kind=torch.int64) for _ in range(2))
    caches = [empty(layers + num_draft_layers, 2, shape.groups, 1024, shape.size) for _ in range(2)]
    angles = [empty(1024, shape.size // 2, kind=torch.float32) for _ in range(2)]
    embedding, norm = empty(shape.vocabulary, shape.hidden), empty(shape.hidden)
    noise = (empty(2, kind=torch.float32), seed) if sampled else (None, None)
    weights = report._layer(shape, torch.bfloat16, False) * (layers + num_draft_layers)
    with report.recorded() as found:
        speculative_round.speculative_round(*bind(
            "speculative_round", token, embedding, weights, *caches, *angles, seed, exits, norm, embedding, 1e-5,
            num_speculations, draft_threshold=0.0 if sampled else 0.5, temperature=noise[0], seed=noise[1],
            num_draft_layers=num_draft_layers,
        ))  # fmt: skip
    drafting = (num_speculations + 1) * (exits + num_draft_layers) * 10 + num_speculations * 4
    verifying = (layers - exits) * 10 + 3
    assert len(found) == drafting + verifying + (4 if sampled else 1)
