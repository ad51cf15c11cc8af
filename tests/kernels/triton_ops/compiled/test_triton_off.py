"""Where triton's interpreter is off and there is no card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import layerskip_kernels as lk
from layerskip_kernels.triton import report

DOCUMENT = Path(__file__).parents[4] / "docs" / "triton.md"


def test_cpu_tensors_are_not_served() -> None:
    with lk.use_backend("triton"), pytest.raises(lk.BackendError, match="TRITON_INTERPRET=1 was not set"):
        lk.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


def test_the_document_lists_every_launch() -> None:
    """Of names, not of figures: those change with triton's version."""
    _, marker, text = DOCUMENT.read_text().partition(report.MARKER)
    assert marker
    for launch in report.launches(report.LLAMA_1B, torch.bfloat16):
        assert f"| {launch.name} |" in text, f"run make triton-report: {launch.name} is not in docs/triton.md"
