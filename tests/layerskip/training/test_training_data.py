"""Datasets of the hub as pairs and prompts, and bad input. `test_registry` has tasks by name."""

from __future__ import annotations

import json
import sys

import pytest

from layerskip.cli.arguments import read_prompts
from layerskip.training import data
from layerskip.training.run import load_pairs


@pytest.fixture
def hub_dataset(tmp_path, monkeypatch):
    """A directory as the hub has them, which `datasets` reads without a network."""
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, numbers in (("train", range(5)), ("test", range(5, 7))):
        rows = [{"question": f"{n} + 1 =", "answer": f" {n + 1}", "n": n} for n in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hub:{folder}"


def test_a_dataset_of_the_hub_by_its_columns(hub_dataset):
    columns = "?prompt=question&completion=answer"
    examples = load_pairs([hub_dataset + columns])[hub_dataset + columns]
    assert [(e.prompt, e.completion) for e in examples] == [(f"{n} + 1 =", f" {n + 1}") for n in range(5)]
    assert [e.completion for e in data.load_hub(f"{hub_dataset}{columns}&split=test")] == [" 6", " 7"]
    assert load_pairs([hub_dataset + columns], "test") == {}
    assert [prompt.text for prompt in read_prompts(f"{hub_dataset}?prompt=question", 2)] == ["0 + 1 =", "2 + 1 ="]


def test_a_dataset_of_the_hub_on_wrong_input(hub_dataset, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown key 'promt', did you mean 'prompt'\?"):
        data.load_hub(f"{hub_dataset}?promt=question")
    with pytest.raises(ValueError, match="no column 'completion'; it has: question, answer, n"):
        data.load_hub(f"{hub_dataset}?prompt=question")
    with pytest.raises(ValueError, match="row 0: expected a text under 'n', got 0"):
        data.load_hub(f"{hub_dataset}?prompt=question&completion=n")
    with pytest.raises(ValueError, match="split is empty"):
        data.load_hub(f"{hub_dataset}?split=")
    with pytest.raises(ValueError, match="names no dataset"):
        data.load_hub("hub:?split=test")
    with pytest.raises(ValueError, match="dev"):
        data.load_hub(f"{hub_dataset}?split=dev")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: [])
    with pytest.raises(ValueError, match="has no rows"):
        data.load_hub(hub_dataset)


def test_a_dataset_of_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"hub:any needs datasets: pip install \"layerskip-kernels\[hub\]\""):
        data.load_hub("hub:any")
