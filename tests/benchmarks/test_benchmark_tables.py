"""The documents print measured figures: tables of the ops, cases where others are faster, comparisons."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import harness
from benchmarks.peers import report as beside_others
from benchmarks.tables import losses, markdown, page, picture

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def row(variant, weights, rows, microseconds, op="linear"):
    spread = {"p10": microseconds / 1e6, "median": microseconds / 1e6, "p90": microseconds / 1e6}
    return {
        "op": op, "model": "tiny", "shape": "2×3", "rows": rows, "variant": variant, "weights": weights,
        "version": f"{variant} 1", "error": 0.0, "machine": harness.machine(), "memory GB/s": 10.0, "GB/s": 5.0,
        "cold": spread, "warm": spread,
    }  # fmt: skip


ROWS = [
    row("cpu", "bf16", 1, 10),
    row("cpu", "int8", 1, 8),
    row("reference", "bf16", 1, 100),
    row("torch", "bf16", 1, 24),
    row("torchao", "int8", 1, 4),
    row("cpu", "bf16", 4, 40),
    row("cpu", "int8", 4, 32),
    row("torch", "bf16", 4, 30),
    row("torchao", "int8", 4, 64),
    row("cpu", "bf16", 128, 7, "early_exit_loss"),
    row("torch", "bf16", 128, 70, "early_exit_loss"),
]


def test_the_tables():
    text = markdown(ROWS)
    assert text.startswith(
        "### linear\n\n| model | shape | weights | 1 row, µs (10–90 %) | of memory | warm, µs | × at 4 rows | "
        "reference, × at 1 · 4 | torch, × at 1 · 4 | torchao, × at 1 · 4 |\n|"
    )
    assert "| tiny | 2×3 | bf16 | 10 (10–10) | 50% | 10 | 4.00 | 10.00 | 2.40 · 0.75 | – |\n" in text
    assert "| tiny | 2×3 | int8 | 8 (8–8) | 50% | 8 | 4.00 | – | 3.00 · 0.94 | 0.50 · 2.00 |\n" in text
    assert "### early_exit_loss\n\n| model | shape | weights | 128 rows, µs (10–90 %) | of memory |" in text
    assert "| warm, µs | torch, × at 128 |\n" in text
    assert "| tiny | 2×3 | bf16 | 7 (7–7) | 50% | 7 | 10.00 |\n" in text
    assert losses(ROWS) in text


def test_where_we_lose_the_worst_first():
    assert losses(ROWS).splitlines() == [
        "### Where we lose", "", "What is faster, by its time over ours:", "",
        "- 0.50×: linear, tiny, 1 row, int8: torchao in int8 4 µs, ours 8 µs",
        "- 0.75×: linear, tiny, 4 rows, bf16: torch in bf16 30 µs, ours 40 µs",
        "- 0.94×: linear, tiny, 4 rows, int8: torch in bf16 30 µs, ours 32 µs",
    ]  # fmt: skip
    assert losses(ROWS[-2:]) == "### Where we lose\n\nNothing that was measured here is faster.\n"


def test_the_page():
    text = page(ROWS, "run")
    assert text.endswith(markdown(ROWS))
    assert "cpu 1, reference 1, torch 1, torchao 1; memory read at 10 GB/s" in text
    assert "`run.jsonl`" in text
    assert "](run.png)" in text


def test_the_picture_has_what_has_several_rows():
    assert picture(ROWS).startswith(b"\x89PNG")
    assert picture(ROWS[-2:]).startswith(b"\x89PNG")  # without a panel


def test_the_page_has_the_rows_of_the_last_run():
    rows = [json.loads(line) for line in (RESULTS / "ops.jsonl").read_text().splitlines()]
    assert (RESULTS / "ops.md").read_text(encoding="utf-8") == page(rows, "ops")


def test_figures_beside_other_engines_are_those_of_the_last_run():
    """On the generated page, and in the README."""
    report = json.loads((RESULTS / "peers.json").read_text())
    assert (RESULTS / "peers.md").read_text(encoding="utf-8") == beside_others.page(report, "peers")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = list(beside_others.pairs(report["tasks"]))
    for bits in (16, 8, 4):
        ratios = [pair.ratio for pair in found if pair.what == f"tokens/s, without drafts, {bits} bits"]
        assert len(ratios) == 3
        least, most = (f"{end(ratios):.1f}" for end in (min, max))
        assert f"**{least if least == most else f'{least} to {most}'}×**" in readme
    for task, words in (("parsing", " our bf16 autoregressive, "), ("coding", ", and ")):
        (pair,) = (pair for pair in found if pair.task == task and pair.what == "tokens/s, whatever is fastest")
        name, speed = pair.ours
        rows = {
            ", ".join(one[part] for part in ("engine", "way", "weights")): one for one in report["tasks"][task]["rows"]
        }
        over = rows[name]["over ours, autoregressive, bf16"]
        assert f"**{speed:.0f} tokens/s**: {over:.1f}×{words}{pair.ratio:.1f}× the fastest of" in readme
