"""Each test that takes ``ops`` runs emulated, and on a GPU with the mark ``gpu``."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_emulation import unavailable

from .runners import GPU, Emulated


@pytest.fixture
def emulated() -> type[Emulated]:
    """For what a GPU cannot be asked: another order of threads, another architecture."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    return Emulated


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def ops(request: pytest.FixtureRequest) -> Emulated | GPU:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return GPU()
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    return Emulated()
