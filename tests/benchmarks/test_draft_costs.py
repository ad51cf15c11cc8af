"""Costs of rounds with drafts: the timed calls, and the table of the last run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from helpers import tiny_model

from benchmarks import draft_costs

ROOT = Path(__file__).parents[2]


def test_every_exit_and_number_of_drafts_is_timed(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(draft_costs, "load", lambda name: (tiny_model("llama2"), None))
    drafted = []
    speculate = draft_costs.LayerSkipModel.speculate

    def noted(model, token, cache, exit_layer, count, **given):
        drafted.append(
            (exit_layer, model.decoder.num_draft_layers, model.decoder.draft_layer_weights[1].element_size(), count)
        )
        return speculate(model, token, cache, exit_layer, count, **given)

    monkeypatch.setattr(draft_costs.LayerSkipModel, "speculate", noted)
    options = ["--exits", "2,1,plain", "1,2", "--speculations", "1", "3", "--context", "9", "--repeat", "2"]
    output = tmp_path / "new" / "costs.json"
    draft_costs.main([*options, "--threads", "1", "--output", str(output)])
    assert sorted(set(drafted)) == [(1, 2, 1, 1), (1, 2, 1, 3), (2, 1, 4, 1), (2, 1, 4, 3)]
    assert len(drafted) == 4 * 3, "once to warm up"
    report = json.loads(output.read_text())
    assert list(report["passes"]) == ["E=2, n=1, plain", "E=1, n=2", draft_costs.LOOKED_UP]
    assert all(cost > 0 for costs in report["passes"].values() for cost in costs.values())
    assert draft_costs.markdown(report) in capsys.readouterr().out


@pytest.mark.parametrize("text", ["2", "2,x", "2,1,other", "2,1,plain,plain"])
def test_an_exit_that_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"an exit is E,n or E,n,plain, got '{text}'"):
        draft_costs.Shape.of(text)


def test_the_table_has_the_figures_of_the_run():
    report = json.loads((ROOT / "benchmarks/results/draft_costs.json").read_text(encoding="utf-8"))
    assert draft_costs.markdown(report) == (ROOT / "benchmarks/results/draft_costs.md").read_text(encoding="utf-8")
