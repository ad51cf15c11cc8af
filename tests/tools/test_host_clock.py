"""The clock of what the host does in a round."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the model is one of transformers'")

from layerskip.decoding.cuda_graphs import Graphs
from tools import host_clock


def test_a_line_for_each_kind_and_number_of_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    host_clock.main(["--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(host_clock.KINDS)
    assert all(float(line.split()[-4]) > 0 for line in lines)


def test_the_card_is_asked_for_one_round_a_step() -> None:
    """Of all sequences together; the step before the first one that is timed launched a round ahead."""
    replays = []

    class Gpu(host_clock.NoGpu):
        def capture(self, function):  # type: ignore[no-untyped-def]
            result, _ = super().capture(function)
            return result, lambda: replays.append(None)

    clock = host_clock.steps(host_clock.decoder(), 4, host_clock.KINDS["greedy"], Graphs(Gpu()))
    next(clock)
    before = len(replays)
    for _ in range(5):
        next(clock)
    assert len(replays) - before == 5
