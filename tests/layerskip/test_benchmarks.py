"""Benchmarks of the ops: what is right is timed, and what the documents print is what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, harness
from benchmarks.cases import MODELS, OPS, Shape
from benchmarks.harness import Group, Variant, measure
from benchmarks.tables import BEGIN, END, document, losses, markdown

ROOT = Path(__file__).parents[2]
TINY = Shape(D=64, F=96, H=4, G=2, C=32, V=300)


class Memory:
    def sample(self):
        return 10.0


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(harness, "ROTATED_BYTES", 2**16)
    monkeypatch.setattr(cases, "CONTEXT", 40)


@pytest.mark.parametrize("op", OPS)
def test_every_way_is_right_and_timed(op):
    for group in OPS[op]("tiny", TINY, [1, 5], ["bf16", "int8", "int4"]):
        rows = list(measure(group, 2, Memory()))
        assert {row["variant"] for row in rows} == {"cpu", "torch"}
        assert len(rows) == (2 if op == "verify_attention" else 4)
        for row in rows:
            assert 0 <= row["error"] < harness.MOST_ERROR
            assert 0 < row["cold"]["p10"] <= row["cold"]["median"] <= row["cold"]["p90"]
            assert len(row["seconds"]) == 2
            assert row["GB/s"] == pytest.approx(row["bytes"] / row["cold"]["median"] / 1e9)
    assert group.variants[0].copies > 1


def variant(name, value, weights="bf16"):
    return Variant(name, weights, lambda copy: torch.tensor([value]), 1, 8, lambda: torch.tensor([1.0]))


def test_cold_calls_rotate_and_warm_ones_stay():
    calls = []
    one = Variant("cpu", "bf16", lambda copy: calls.append(copy) or torch.ones(1), 3, 8, lambda: torch.ones(1))
    (row,) = measure(Group("linear", "tiny", "1", 1, [one]), 4, Memory())
    assert calls == [0, 1, 1, 2, 2, 0, 0, 1, 1]  # the first was checked; then cold, warm, cold, …
    assert row["memory GB/s"] == 10.0


def test_what_is_wrong_is_not_timed():
    group = Group(
        "linear", "tiny", "1", 1, [variant("cpu", 1.1), variant("cpu", float("nan"), "int8"), variant("torch", 1.0)]
    )
    wrong, broken, right = measure(group, 2, Memory())
    assert wrong["error"].startswith("cpu in bf16: an error of 0.1")
    assert "cold" not in wrong
    assert broken["error"].startswith("cpu in int8: an error of nan")
    assert right["error"] == 0
    assert "cold" in right


def row(variant, weights, rows, microseconds):
    spread = {"p10": microseconds / 1e6, "median": microseconds / 1e6, "p90": microseconds / 1e6}
    return {
        "op": "linear", "model": "tiny", "shape": "2×3", "rows": rows, "variant": variant, "weights": weights,
        "error": 0.0, "machine": harness.machine(), "memory GB/s": 10.0, "GB/s": 5.0, "cold": spread, "warm": spread,
    }  # fmt: skip


def test_the_table_and_where_torch_is_faster():
    rows = [
        row("cpu", "bf16", 1, 10),
        row("torch", "bf16", 1, 25),
        row("cpu", "bf16", 4, 40),
        row("torch", "bf16", 4, 30),
    ]
    assert markdown(rows).splitlines()[2] == (
        "| linear | tiny | 2×3 | bf16 | 10 (10–10) | 50% | 10 | 4.00× | 2.50× | 0.75× |"
    )
    assert losses(rows).splitlines()[2:] == ["- linear, tiny, 4 rows, bf16: 0.75×"]
    assert losses(rows[:2]) == "Nowhere here is torch's bf16 faster.\n"
    text = document(f"before\n{BEGIN}\nold\n{END}\nafter", rows)
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter")
    assert "old" not in text
    assert markdown(rows) in text
    with pytest.raises(ValueError, match="must have"):
        document("no markers", rows)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "SmolLM2-135M", TINY)
    monkeypatch.setattr(command, "ReadBandwidth", Memory)
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    arguments = [
        "--models", "SmolLM2-135M", "--ops", "linear", "--rows", "1", "2", "--repeats", "2", "--formats", "bf16",
        "--output", str(tmp_path / "ops"), "--document", str(page), "--threads", "1",
    ]  # fmt: skip
    command.main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert markdown(rows) in page.read_text()
    assert markdown(rows) in capsys.readouterr().out
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_the_document_has_what_was_measured():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/ops.jsonl").read_text().splitlines()]
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert document(text, rows) == text


def test_figures_beside_others_are_those_of_the_run():
    """Each figure of the table of peers, and each of the README, is in the JSON that the table names."""
    report = json.loads((ROOT / "benchmarks/results/peers.json").read_text())
    ratio = "over ours, autoregressive, bf16"
    measured = {
        (f"{one['engine']}, {one['way']}", one["weights"], task): f"{one['tokens/s']:.0f} ({one[ratio]:.2f}×)"
        for task, found in report["tasks"].items()
        for one in found["rows"]
    }
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r"\| (layerskip|llama\.cpp|openvino|transformers), ", line)]
    assert len(lines) == len(measured) / len(report["tasks"])
    for line in lines:
        way, weights, *cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        assert cells[:3] == [measured[way, weights, task] for task in ("parsing", "coding", "summarization")]
    best = {task: max(one["tokens/s"] for one in report["tasks"][task]["rows"]) for task in ("parsing", "coding")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"**{speed:.0f} tokens/s**" in readme for speed in best.values())
