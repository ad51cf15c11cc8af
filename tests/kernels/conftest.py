"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .common import ISAS, PATHS, native_isa, running_on


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN (integers: the largest), so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the reference, and on the native kernels of every instruction set that this machine has."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the native kernels of every instruction set that this machine has."""
    with running_on(request.param):
        yield native_isa(request.param)
