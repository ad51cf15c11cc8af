"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import layerskip_kernels as lk
from layerskip_kernels import _extension

from .common import ISAS, PATHS, TILES, native_isa, running_on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark repetitions of a test as slow.

    That is fp16, which shares its code with bf16, an instruction set between this machine's best and the portable, and
    tiles with another dtype than bf16.
    """
    best = ISAS[0] if _extension.cpu_reason is not None else lk.cpu_isa()
    repetitions = {torch.float16, *ISAS} - {best, "portable", *TILES}
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        values = {params.get(name) for name in ("dtype", "isa", "path")}
        if repetitions & values or (values & {*TILES} and values & {torch.float32, torch.float16}):
            item.add_marker(pytest.mark.slow)


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
