"""Each test that takes ``ops`` runs emulated, and on a card with the mark ``gpu``."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_emulation import unavailable

from .runners import Card, Emulated


@pytest.fixture
def emulated() -> type[Emulated]:
    """For what a card cannot be asked: another order of threads, another architecture."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    return Emulated


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def ops(request: pytest.FixtureRequest) -> Emulated | Card:
    if request.param == "card":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA card")
        return Card()
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    return Emulated()
