"""Set-up of every test: Triton's interpreter where there is no GPU, one thread a worker under xdist, a time limit."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from .time_limit import SECONDS, time_limit

if not torch.cuda.is_available():
    # Read by triton when it is first imported, so it must be set before any test module is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests that compare numbers of threads get these, however busy the machine is; read when the library is first used.
os.environ.setdefault("LAYERSKIP_FIXED_THREADS", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers already share the cores; a second thread each would spin at barriers for a core it does not have.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail where groups of tests, which share costly fixtures, are ignored."""
    grouped = item.config.getoption("loadgroup", False) and item.get_closest_marker("xdist_group")
    if grouped and "@" not in item.nodeid:
        pytest.fail("pytest-xdist ignores this test's group: install 'pytest<9.2'")


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Fail the test that leaves settings of the process changed, not those after it."""
    before = _settings()
    yield
    after = _settings()
    if after != before:
        torch.set_grad_enabled(before["gradients"])
        torch.set_num_threads(before["threads"])
        torch.set_default_dtype(before["default dtype"])
        raise AssertionError(f"settings of the process are changed: {before} became {after}")


def _settings() -> dict[str, object]:
    from layerskip_kernels.dispatch import forced  # not before the environment is set

    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "backend": forced(),
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Bound the time of a test, so that a hang does not end the suite."""
    mark = item.get_closest_marker("time_limit")
    with time_limit(mark.args[0] if mark else SECONDS):
        return (yield)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models of a few thousand weights are too small for a second thread, which would wait at every barrier."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
