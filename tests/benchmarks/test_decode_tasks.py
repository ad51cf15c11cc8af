"""The table of decoding by task: its content, and when it is not written."""

from __future__ import annotations

import json

import pytest

from benchmarks import decode_tasks
from benchmarks.decode_tasks import Point

POINT = Point("parsing:test", 8, "smollm2-layerskip", 4, 6, "smollm2-layerskip")
WAY = {"acceptance_rate": 0.85, "tokens_per_second": 327.4, "speedup_of_means": 3.28, "mean_speedup": 3.27}


def report(identical):
    """Stands for `layerskip bench`; writes what that writes, as far as it is read."""

    def bench(arguments):
        assert arguments[:2] == ["bench", "--only-ours"]
        stem = arguments[arguments.index("--output") + 1]
        summary = {"autoregressive": {"tokens_per_second": 95.6}, "self-speculative": WAY}
        with open(f"{stem}.json", "w") as file:
            json.dump({"identical": identical, "summary": summary}, file)
        return 0 if identical else 1

    return bench


def test_a_line(monkeypatch):
    monkeypatch.setattr(decode_tasks, "layerskip", report(identical=True))
    lines = decode_tasks.markdown([decode_tasks.measure(POINT, limit=1, threads=1)]).splitlines()
    assert lines[-1] == "| parsing:test | smollm2-layerskip | 4 | 6 | reduced | 85.0% | 96 | 327 | 3.28× | 3.27× |"
    assert len({line.count("|") for line in lines}) == 1


def test_no_line_where_tokens_differ(monkeypatch):
    monkeypatch.setattr(decode_tasks, "layerskip", report(identical=False))
    with pytest.raises(RuntimeError, match="differ from the autoregressive ones"):
        decode_tasks.measure(POINT, limit=1, threads=1)


def test_a_run_that_is_cut_short_leaves_what_it_has(monkeypatch, tmp_path):
    done = []

    def interrupted(point, limit, threads):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(point)
        return dict(
            zip(decode_tasks.COLUMNS, (*point[:1], *point[2:5], "full", 0.5, 1.0, 2.0, 2.0, 2.0, True), strict=True)
        )

    monkeypatch.setattr(decode_tasks, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_tasks.main(["--only", "parsing:test", "--output", str(tmp_path / "out" / "table")])
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["rows"]) == 2
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 4


def test_a_task_that_is_none(capsys):
    with pytest.raises(SystemExit):
        decode_tasks.main(["--only", "knitting"])
    assert "--only names none of coding:humaneval, parsing:test" in capsys.readouterr().err
