"""Weights are read once, however many rows travel together; docs/cuda.md has all the numbers."""

from __future__ import annotations

import pytest

from tests.cuda_emulation import unavailable
from tools.roofline import COUNTED, cases, measure

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.mark.parametrize(("rows", "limit"), [(1, 1.01), (7, 1.04)])
def test_bytes_moved_over_bytes_needed(rows: int, limit: float) -> None:
    ops = {name: (needed, run) for name, needed, run in cases(COUNTED, rows)}
    names = ["linear", "swiglu", "partial_forward, one layer", "exit_head", "exit_head, int8 and token_map"]
    for name in [*names, "linear, int8", "linear, int4", "exit_head, int8"]:
        row = measure(name, *ops[name])
        assert 0.999 < row.ratio < limit, row
