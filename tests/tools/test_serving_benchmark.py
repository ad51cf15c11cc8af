"""The open-loop client of the serving benchmark, its figures and its picture, without a server."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time

import pytest

from benchmarks import serving
from benchmarks.serving import COLUMNS, COUNTERS, WAYS, Answer, arrivals, opened, picture, quantile, row, summary


def test_requests_come_as_a_poisson_process_does():
    times = arrivals(4001, 5.0, seed=1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    # An exponential distribution's mean and deviation are both 1 / rate; four standard errors of 4000 gaps.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=4 / 4000**0.5)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=4 * 2**0.5 / 4000**0.5)
    assert arrivals(5, 5.0, seed=1) == times[:5]
    assert arrivals(5, 5.0, seed=2) != times[:5]
    assert arrivals(5, 10.0, seed=1) == pytest.approx([moment / 2 for moment in times[:5]])


def test_a_request_does_not_wait_for_the_answers_of_earlier_ones(monkeypatch):
    asked = {}

    async def slow(session, address, prompt, tokens):
        asked[prompt] = time.perf_counter()
        await asyncio.sleep(0.5)
        return Answer(prompt, tokens, 0.1, 0.5)

    monkeypatch.setattr(serving, "ask", slow)
    answers = asyncio.run(opened(None, "", ["a", "b", "c"], 4, [0.0, 0.01, 0.1]))
    assert [answer.text for answer in answers] == ["a", "b", "c"]
    assert asked["a"] <= asked["b"] <= asked["c"]
    assert asked["c"] - asked["a"] >= 0.099
    assert asked["b"] - asked["a"] < 0.5


def test_figures_of_a_run():
    answers = [Answer("x", 5, 0.1, 0.5), Answer("y", 1, 0.2, 0.2), Answer("z", 11, 0.3, 2.3)]
    before, after = (dict.fromkeys(COUNTERS, value) for value in (1.0, 9.0))
    after[COUNTERS[1]] = 7.0
    found = summary(answers, 2.0, before, after)
    assert found["tokens/s"] == 8.5
    assert found["requests/s"] == 1.5
    assert found["accepted"] == 0.75
    assert found["first token p50"] == 0.2
    assert found["first token p90"] == pytest.approx(0.28)
    assert found["token p50"] == pytest.approx(0.15)  # of 0.1 and 0.2; an answer of one token has none
    assert found["whole answer p90"] == pytest.approx(1.94)
    assert summary(answers, 2.0, before, before)["accepted"] is None


def test_quantiles():
    assert quantile([], 0.5) is None
    assert quantile([3.0], 0.9) == 3.0
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == statistics.median([1, 2, 3, 4])
    assert quantile([2.0, 1.0], 1.0) == 2.0


def test_lines_and_picture(tmp_path):
    counts = dict.fromkeys(COUNTERS, 0.0)
    lines = []
    for kind, size in (("clients", 1), ("rate", 2.0), ("rate", 4.0)):
        for way in WAYS:
            found = summary([Answer("x", 5, 0.1, 0.5), Answer("y", 4, 0.2, 0.4)], 1.0, counts, counts)
            lines.append({"way": way, "kind": kind, "size": size, "load": f"{size:g} {kind}", **found})
    assert row(lines[0]).count("|") == len(COLUMNS) + 1
    assert serving.different(lines) == {"1 clients": 0, "2 rate": 0, "4 rate": 0}
    picture(lines, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
