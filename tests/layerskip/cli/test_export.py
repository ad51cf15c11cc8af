"""``layerskip export``: the first layers as a model of their own, and a whole model for vLLM's plugin."""

from __future__ import annotations

import json

import pytest
import torch
from exits_of import copied_exit
from helpers import ARCHITECTURES, VOCABULARY, random_tokens, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerskip
from layerskip import DraftHead, Exit, SelfSpeculativeDecoder
from layerskip.cli import main
from layerskip.cli.export import first_layers
from layerskip.models import adapt

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = random_tokens(1, 7)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def export(directory, output, *options):
    arguments = ["--model", str(directory), "--dtype", "float32", "--exit-layer", "2", "--output", str(output)]
    return main(["export", *arguments, *options])


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_layers_say_what_the_model_says_after_them(architecture):
    model = tiny_model(architecture)
    state = model(PROMPT, output_hidden_states=True).hidden_states[3]
    expected = model.lm_head(model.model.norm(state))
    shallow = first_layers(model, 3)
    assert torch.equal(shallow(PROMPT).logits, expected)
    assert shallow.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 4
    theirs = {weight.data_ptr() for weight in model.parameters()}
    assert all(weight.data_ptr() in theirs for weight in shallow.parameters())


@pytest.mark.parametrize("architecture", ["llama2", "qwen3"])
def test_transformers_drafts_with_it(architecture, tmp_path):
    save_tiny(tmp_path / "model", architecture)
    assert export(tmp_path / "model", tmp_path / "draft") == 0
    model, draft = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "draft"))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(PROMPT, **options)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(model.generate(PROMPT, assistant_model=draft, **options), expected)
    assert len(passes) <= 20


def test_what_is_written_loads(directory, tmp_path, capsys):
    assert export(directory, tmp_path / "draft") == 0
    assert f"wrote 2 of 4 layers to {tmp_path / 'draft'}" in capsys.readouterr().out
    model, tokenizer = layerskip.load(tmp_path / "draft", torch.float32)
    assert len(model.model.layers) == 2
    assert tokenizer("w5").input_ids == AutoTokenizer.from_pretrained(directory)("w5").input_ids
    assert "layerskip" not in json.loads((tmp_path / "draft" / "config.json").read_text())


def test_a_whole_model_says_how_it_drafts(directory, tmp_path, capsys):
    DraftHead([3, 5], VOCABULARY).save(directory)
    assert export(directory, tmp_path / "whole", "--whole", "--num-speculations", "6") == 0
    assert "with draft_head.safetensors" in capsys.readouterr().out
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["layerskip"] == {"exit_layer": 2, "num_speculations": 6}
    assert DraftHead.load(tmp_path / "whole").token_ids.tolist() == [3, 5]
    before, after = (layerskip.load(path, torch.float32)[0].state_dict() for path in (directory, tmp_path / "whole"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert export(tmp_path / "whole", tmp_path / "again") == 0  # of one that was written


def test_a_whole_model_brings_its_exit(directory, tmp_path, capsys):
    """Instead of a draft head, for an exit has its own."""
    DraftHead([3, 5], VOCABULARY).save(directory)
    model = layerskip.load(directory, torch.float32)[0]
    copied_exit(adapt(model), num_draft_layers=2).save(tmp_path / "exit")
    arguments = ["--model", str(directory), "--dtype", "float32", "--exit", str(tmp_path / "exit")]
    arguments += ["--output", str(tmp_path / "whole")]
    assert main(["export", *arguments]) == 2
    assert "--exit needs --whole" in capsys.readouterr().err
    assert main(["export", *arguments, "--whole", "--num-speculations", "3"]) == 0
    assert "with exit.safetensors" in capsys.readouterr().out
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["layerskip"] == {"exit": "exit.safetensors", "num_speculations": 3}
    decoder = SelfSpeculativeDecoder.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert (decoder.exit_layer, decoder.num_speculations) == (2, 3)
    assert decoder.generate(PROMPT, max_new_tokens=16).stats.acceptance_rate == 1


def test_an_exit_of_another_model_is_refused(directory, tmp_path, capsys):
    Exit(2, torch.ones(8), 5, VOCABULARY).save(tmp_path / "exit")
    arguments = ["--model", str(directory), "--exit", str(tmp_path / "exit"), "--output", str(tmp_path / "whole")]
    assert main(["export", *arguments, "--whole"]) == 2
    assert "the exit is for a model of 5 layers, this one has 4" in capsys.readouterr().err


def test_an_earlier_export_is_replaced_only_when_told(directory, tmp_path, capsys):
    assert export(directory, tmp_path / "draft") == 0
    assert export(directory, tmp_path / "draft", "--exit-layer", "1") == 2
    assert "draft exists; give another name, or --overwrite" in " ".join(capsys.readouterr().err.split())
    assert export(directory, tmp_path / "draft", "--exit-layer", "1", "--overwrite") == 0
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_a_model_is_not_replaced_by_what_is_made_of_it(directory, tmp_path, capsys, command):
    """Though this tool wrote it, and under another name."""
    assert export(directory, tmp_path / "model", "--whole") == 0
    (tmp_path / "link").symlink_to("model", target_is_directory=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for model, output in (("model", "model"), ("link", "model"), ("model", "link")):
        if command == "export":
            code = export(tmp_path / model, tmp_path / output, "--overwrite")
        else:
            names = [str(tmp_path / model), "--output", str(tmp_path / output)]
            code = main(["quantize", *names, "--weights", "int8", "--overwrite"])
        assert code == 2
        assert "is or holds the input" in " ".join(capsys.readouterr().err.split())
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit-layer", "4"], "--exit-layer must be in 1 … 3, got 4"),
        (["--output", "TAKEN"], "was not written by layerskip; move it away"),
    ],
)
def test_errors_leave_nothing(directory, tmp_path, capsys, options, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    assert export(directory, tmp_path / "new", *[str(tmp_path / "taken") if o == "TAKEN" else o for o in options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
