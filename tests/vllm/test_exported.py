"""What ``layerskip export`` writes: without the plugin an ordinary draft model, with it one that needs one flag."""

from __future__ import annotations

import shutil

import pytest

from layerskip import DraftHead
from layerskip.cli import main

from .engines import engine, generate, runner
from .models import VOCABULARY, copied, prompts, write_model

LENGTHS = (3, 17, 40)


@pytest.fixture(scope="module")
def expected(model):
    with engine(model) as llm:
        return generate(llm, prompts(*LENGTHS))


def export(model, output, *options):
    arguments = ["--model", str(model), "--dtype", "float32", "--exit-layer", "2", "--output", str(output)]
    assert main(["export", *arguments, *options]) == 0
    return output


def test_the_first_layers_are_an_ordinary_draft_model(model, expected, tmp_path):
    draft = export(model, tmp_path / "draft")
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 4}
    with engine(model, speculative_config=speculation) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        acceptance = llm.drafts.acceptance
    with engine(model, load_format="layerskip", model_loader_extra_config={"exit_layer": 2}) as llm:
        generate(llm, prompts(*LENGTHS))
        assert llm.drafts.acceptance == acceptance > 0.2


def test_a_whole_model_brings_exit_layer_drafts_and_draft_head(model, expected, tmp_path):
    whole = export(model, tmp_path / "whole", "--whole", "--num-speculations", "3")
    (whole / "model.safetensors.index.json").unlink(missing_ok=True)
    DraftHead(sorted({token for tokens in expected for token in tokens}), VOCABULARY).save(whole)
    with engine(whole, load_format="layerskip") as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
        assert llm.drafts.acceptance > 0.2
        drafter = runner(llm).drafter
        assert drafter.num_speculative_tokens == 3
        assert drafter.model._head._head.num_rows < VOCABULARY


def test_a_whole_model_brings_a_trained_exit(tmp_path):
    write_model(tmp_path / "model", upper=1.0)
    trained = copied(tmp_path / "model")["model_loader_extra_config"]["exit"]
    arguments = ["--model", str(tmp_path / "model"), "--dtype", "float32", "--exit", trained, "--whole"]
    assert main(["export", *arguments, "--output", str(tmp_path / "whole")]) == 0
    (tmp_path / "whole" / "model.safetensors.index.json").unlink()  # the exit's file is no weight without it, either
    with engine(tmp_path / "whole", load_format="layerskip") as llm:
        generate(llm, prompts(*LENGTHS))
        assert llm.drafts.acceptance == 1


def test_vllm_without_the_plugin_reads_a_whole_model_with_its_draft_head(model, expected, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    DraftHead([1, 2], VOCABULARY).save(tmp_path / "model")
    with engine(export(tmp_path / "model", tmp_path / "whole", "--whole")) as llm:
        assert generate(llm, prompts(*LENGTHS)) == expected
