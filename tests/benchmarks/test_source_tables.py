"""The pages of draft sources have the figures of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sources

ROOT = Path(__file__).parents[2]
RUNS = ["sources", "sources_sampled"]


def report_of(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_the_page_has_the_figures_of_the_run(name):
    text = (ROOT / f"benchmarks/results/{name}.md").read_text(encoding="utf-8")
    assert sources.page(report_of(name)) == text


@pytest.mark.parametrize("name", RUNS)
def test_all_was_run(name):
    report = report_of(name)
    rows, ways = report["rows"], [sources.PLAIN, *report["settings"]["sources"]]
    assert [(row["task"], row["way"]) for row in rows] == [(task, way) for task in sources.TASKS for way in ways]
    assert {row["prompts"] for row in rows} == {20}
    assert report["settings"]["temperature"] or all(row["identical"] for row in rows)


def test_the_readme_has_the_figures_of_the_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    speeds = {row["task"]: row["speedup"] for row in report_of("sources")["rows"] if row["way"] == sources.WAY}
    for task, speed in speeds.items():
        assert f"{'questions' if task == 'chat' else task} {speed:.1f}×" in text, task


def test_a_table_by_hand():
    def row(way, speedup):
        return {
            "task": "chat", "way": way, "tokens/s": 100 * speedup, "speedup": speedup, "median": speedup,
            "tokens a round": 1.5, "accepted": "ngram 1 of 2 (50%)", "repeated 4-grams": 0.25, "identical": True,
        }  # fmt: skip

    settings = {"exit": "E", "sources": ["auto", "ngram"], "limit": 1, "threads": 2, "temperature": 0.0,
                "cpu_time": False, "max_new_tokens": 9}  # fmt: skip
    report = {"machine": {"cpu": "C", "isa": "avx2", "threads": 2}, "settings": settings,
              "rows": [row("autoregressive", 1.0), row("auto", 1.25), row("ngram", 1.5)]}  # fmt: skip
    text = sources.page(report)
    assert text.splitlines()[:7] == [
        "# Draft sources", "",
        "C, avx2, 2 threads, 9 new tokens, autoregressive decoding 100 to 100 tokens/s "
        "(`python -m benchmarks.sources --exit E --sources auto ngram --limit 1 --threads 2`):",
        "",
        "| task | auto | ngram | auto, tokens a round | auto's drafts accepted, by place in the round | "
        "repeated 4-grams | goal |",
        "|---|---|---|---|---|---|---|",
        "| chat | 1.25× | **1.50×** | 1.50 | ngram 1 of 2 (50%) | 25% | 1.4×, missed |",
    ]  # fmt: skip
    assert text.endswith(sources.markdown(report["rows"]))
    report["settings"]["sources"] = ["ngram"]
    assert sources.page(report).splitlines()[4].startswith("| task | way |")
