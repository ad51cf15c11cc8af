"""`layerskip tune`: its candidates, its file, and that `from_pretrained` reads it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from exits_of import copied_exit, random_exit
from helpers import save_tiny
from tiny import VOCABULARY, prompt_of, tiny_model

from layerskip import DraftHead, Exit, SelfSpeculativeDecoder
from layerskip.cli import main, tune
from layerskip.decoding.tuning import FILE_NAME, Tuning
from layerskip.models import adapt, load
from layerskip.vllm.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def directory(tmp_path):
    return save_tiny(tmp_path / "model", "llama2")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["w5 w8 w13", "w2 w3", "w4", "w30 w31", "w50"]) + "\n")
    return str(path)


def speeds(monkeypatch, factor):
    """Let a way be measured as ``factor(name)`` times as fast as none; what was measured."""
    measured = []

    def measure(self, name, ids):
        measured.append((name, ids.tolist()))
        return tune.Measured(100, 1 / factor(name), "same")

    monkeypatch.setattr(tune.Tuner, "measure", measure)
    return measured


def fast_int8(name):
    return {tune.PLAIN: 1.0, "exit E=2, K=4, int8 head": 2.0}.get(name, 1.2)


def test_the_fastest_way_is_written_beside_the_model(directory, texts, monkeypatch, capsys):
    measured = speeds(monkeypatch, fast_int8)
    arguments = ["tune", str(directory), "--prompts", texts, "--max-new-tokens", "8", "--dtype", "float32"]
    assert main(arguments) == 0
    assert "2.00×" in capsys.readouterr().out
    content = json.loads((directory / FILE_NAME).read_text())
    assert content.pop("measured")["speedup"] == 2.0
    assert content == {"exit_layer": 2, "num_speculations": 4, "draft_head": "int8", "draft_source": "exit"}
    assert not (directory / f"{FILE_NAME}.partial").exists()
    by_prompt = [
        sum(ids == prompt for _, ids in measured) for prompt in {str(ids): ids for _, ids in measured}.values()
    ]
    assert by_prompt[0] == len({name for name, _ in measured})
    assert by_prompt == sorted(by_prompt, reverse=True), "the slow ways do not see all prompts"
    assert by_prompt[-1] < by_prompt[0] / 2
    decoder = SelfSpeculativeDecoder.from_pretrained(directory, dtype=torch.float32)
    assert (decoder.exit_layer, decoder.num_speculations) == (2, 4)
    assert decoder.draft_head.head_weight.dtype == torch.int8
    assert SelfSpeculativeDecoder.from_pretrained(directory, exit_layer=3).exit_layer == 3
    assert main(arguments) == 2, "it is not replaced unasked"
    assert FILE_NAME in capsys.readouterr().err


def test_it_measures_for_real(directory, texts, tmp_path, capsys):
    exit_dir = tmp_path / "trained"
    copied_exit(adapt(load(directory, torch.float32)[0]), 2, 2).save(exit_dir)
    output = tmp_path / "mine.json"
    arguments = ["tune", str(directory), "--prompts", texts, "--max-new-tokens", "12", "--dtype", "float32"]
    assert main([*arguments, "--exit", str(exit_dir), "--output", str(output)]) == 0
    decoder = SelfSpeculativeDecoder.from_pretrained(directory, dtype=torch.float32, tuning=output)
    if json.loads(output.read_text())["draft_source"] != "ngram":
        assert decoder.model.decoder.num_draft_layers == 2
    plain = decoder.generate(prompt_of(5), 30, strategy="autoregressive")
    assert torch.equal(decoder.generate(prompt_of(5), 30).sequences, plain.sequences)


def test_where_nothing_is_faster_each_round_picks(directory, texts, monkeypatch, capsys):
    speeds(monkeypatch, lambda name: 1.0 if name == tune.PLAIN else 0.9)
    assert main(["tune", str(directory), "--prompts", texts, "--max-new-tokens", "8"]) == 0
    assert "no candidate is faster than decoding without drafts" in capsys.readouterr().out
    assert Tuning.load(directory).draft_source == "auto"


def test_other_tokens_are_a_failure(directory, texts, monkeypatch, capsys):
    monkeypatch.setattr(tune.Tuner, "measure", lambda self, name, ids: tune.Measured(9, 0.5, name))
    assert main(["tune", str(directory), "--prompts", texts, "--max-new-tokens", "8"]) == 1
    assert "other tokens than the full model's" in capsys.readouterr().out
    assert not (directory / FILE_NAME).exists()


def test_an_interrupt_loses_nothing(directory, texts, monkeypatch, capsys):
    counted = speeds(monkeypatch, fast_int8)
    measure = tune.Tuner.measure

    def stopped(self, name, ids):
        if len(counted) == 20:
            raise KeyboardInterrupt
        return measure(self, name, ids)

    monkeypatch.setattr(tune.Tuner, "measure", stopped)
    arguments = ["tune", str(directory), "--prompts", texts, "--max-new-tokens", "8"]
    assert main(arguments) == 130
    assert re.search(r"20 of \d+ measurements are in", " ".join(capsys.readouterr().err.split()))
    monkeypatch.setattr(tune.Tuner, "measure", measure)
    assert main(arguments) == 0
    assert len({(name, str(ids)) for name, ids in counted}) == len(counted), "nothing is measured twice"
    assert Tuning.load(directory).draft_head == "int8"
    assert main([*arguments, "--overwrite", "--limit", "2"]) == 0


def test_what_is_tried():
    ways = tune.candidates(30, None, None)
    assert {way.draft_source for way in ways} == {"exit", "ngram", "auto"}
    assert {way.exit_layer for way in ways if way.draft_source == "exit"} == {4, 8, 15, 22}
    assert {way.draft_head for way in ways} == {"full", "int8"}
    model = adapt(tiny_model())
    own = tune.candidates(4, random_exit(model, 3), "here")
    assert {way.exit_layer for way in own if way.draft_source == "exit"} == {3}
    assert {way.exit for way in own if way.draft_source != "ngram"} == {"here"}
    reduced = tune.candidates(4, random_exit(model, 3, token_ids=[1, 2]), "here")
    assert {way.draft_head for way in reduced} == {None}
    for some in (ways, own, reduced):
        assert len({tune.name_of(way) for way in some}) == len(some)


def test_names_and_paths_in_the_file(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    model = adapt(tiny_model())
    inside, outside = (
        random_exit(model).save(tmp_path / "here" / "exit"),
        random_exit(model).save(tmp_path / "elsewhere"),
    )
    head = DraftHead([1, 2], VOCABULARY).save(tmp_path / "here")
    path = tmp_path / "here" / FILE_NAME
    for exit_, kept in ((str(inside.parent), "exit"), (str(outside), str(outside)), ("smollm2", "smollm2")):
        Tuning(2, 4, str(head), exit=exit_).save(path, {})
        assert json.loads(path.read_text())["exit"] == kept
        assert Tuning.load(path).exit == exit_
    assert json.loads(path.read_text())["draft_head"] == "draft_head.safetensors"
    assert Tuning.load(tmp_path / "here").options["draft_head"].token_ids.tolist() == [1, 2]


def test_a_model_that_export_wrote_says_it_itself(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "layerskip": {"exit_layer": 3, "num_speculations": 6}})
    )
    DraftHead([1, 2], VOCABULARY).save(directory)
    decoder = SelfSpeculativeDecoder.from_pretrained(directory)
    assert (decoder.exit_layer, decoder.num_speculations) == (3, 6)
    assert decoder.draft_head.num_rows == 2
    assert SelfSpeculativeDecoder.from_pretrained(directory, exit_layer=1).draft_head.num_rows == VOCABULARY


def test_without_a_file_it_is_auto(directory):
    assert SelfSpeculativeDecoder.from_pretrained(directory).exit_layer == "auto"


def test_vllm_reads_it_too(directory):
    config = load(directory)[0].config
    Tuning(3, 6, "int8").save(directory / FILE_NAME, {})
    assert Settings.of({}, config, str(directory)) == Settings(3, 6, "int8")
    Tuning("auto", "auto", draft_source="auto").save(directory / FILE_NAME, {})
    assert Settings.of({}, config, str(directory)) == Settings(1, 4, "full")
    Exit(2, torch.ones(config.hidden_size), config.num_hidden_layers, config.vocab_size).save(directory)
    Tuning("auto", 6, None, exit=str(directory)).save(directory / FILE_NAME, {})
    assert Settings.of({}, config, str(directory)) == Settings(2, 6, "exit", exit=str(directory / "."))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", r"must be an object, got \[\]"),
        ('{"exit_layr": 2}', "has 'exit_layr', expected only exit_layer, num_speculations"),
    ],
)
def test_a_broken_file_is_named(directory, content, message):
    (directory / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=f"{FILE_NAME} {message}"):
        SelfSpeculativeDecoder.from_pretrained(directory)


def test_what_cannot_be(directory, texts, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no layerskip\.json at .*nowhere; layerskip tune"):
        SelfSpeculativeDecoder.from_pretrained(directory, tuning=tmp_path / "nowhere")
    assert main(["tune", str(directory), "--prompts", texts, "--max-new-tokens", "256"]) == 2
    assert "none of 5 prompts fits with 256 new tokens" in capsys.readouterr().err
    assert main(["tune", str(directory), "--prompts", texts, "--exit", str(tmp_path / "nothing")]) == 2
    assert "no exit at" in capsys.readouterr().err
