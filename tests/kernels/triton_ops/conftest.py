"""``cases/`` runs in triton's interpreter, which the suite's conftest turns on where there is no GPU, or on a GPU
(then with the mark ``gpu``). ``compiled/`` needs the interpreter off: `test_triton_compiled` gives it its own process.

This folder is not called "triton": pytest puts its parent on sys.path, where it would pass for an absent triton.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = []
if find_spec("triton") is None:
    collect_ignore += ["cases", "compiled"]
elif INTERPRETED:
    collect_ignore.append("compiled")
else:
    collect_ignore.append("test_triton_compiled.py")
    if not torch.cuda.is_available():
        collect_ignore.append("cases")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and Path(item.fspath).parent == Path(__file__).parent / "cases":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
