"""Weights are read once, however many rows travel together; benchmarks/results/cuda_bytes.md has all the numbers."""

from __future__ import annotations

import pytest

import tools.roofline
from tests.cuda_emulation import library, planted, unavailable
from tests.cuda_emulation.build import ROOT
from tools.roofline import COUNTED, Shape, cases, measure

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.mark.parametrize(("rows", "limit"), [(1, 1.01), (7, 1.04)])
def test_bytes_moved_over_bytes_needed(rows: int, limit: float) -> None:
    ops = {name: (needed, run) for name, needed, run in cases(COUNTED, rows)}
    names = ["linear", "swiglu", "partial_forward, one layer", "exit_head", "exit_head, int8 and token_map"]
    for name in [*names, "linear, int8", "linear, int4", "exit_head, int8"]:
        row = measure(name, *ops[name])
        assert 0.999 < row.ratio < limit, row


@pytest.mark.slow
def test_many_rows_share_a_pass_over_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 rows were three passes of 16; of the bytes that L2 gives those of x remain."""
    ops = {name: (needed, run) for name, needed, run in cases(COUNTED, 40)}
    text = "if constexpr (!std::is_same_v<T, float>) {"
    change = (text, "if constexpr (false) {")
    alone = planted("layers", "groups-alone", ROOT / "csrc/cuda/linear_tile.cuh", change)
    for name, factor in (("linear", 1.5), ("swiglu", 1.8), ("linear, int8", 1.3), ("linear, int4", 1.1)):
        shared = measure(name, *ops[name])
        assert shared.ratio < 1.01
        with monkeypatch.context() as patch:
            patch.setattr(tools.roofline, "library", lambda file: alone if file == "layers" else library(file))
            assert measure(name, *ops[name]).l2 > factor * shared.l2


@pytest.mark.parametrize("name", ["exit_head", "exit_head, int8 and token_map", "exit_head, int8", "exit_head, int4"])
def test_many_states_share_a_pass_over_the_head(name: str) -> None:
    """As many passes as there are groups of 16 would be three times the bytes."""
    assert _from_l2(Shape(512, 64, 8, 2, 64, 2048, 16), name) < 1.5


def test_wide_states_share_a_pass_over_the_head() -> None:
    """40 of these are 320 KiB; passes of whole ones, 20 each, would be twice the weights."""
    assert _from_l2(Shape(4096, 64, 8, 2, 64, 2048, 16), "exit_head") < 1.3


def _from_l2(shape: Shape, name: str) -> float:
    """Bytes over those that must move, of 40 rows."""
    needed, run = {one: (needed, run) for one, needed, run in cases(shape, 40)}[name]
    return measure(name, needed, run).l2 / needed
