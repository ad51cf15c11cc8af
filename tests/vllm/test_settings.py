"""Where the exit layer, the number of drafts and the draft head come from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from layerskip import Exit
from layerskip.decoding.tuning import Tuning
from layerskip.vllm import version_problem
from layerskip.vllm.settings import Settings, split


def config(**own):
    return SimpleNamespace(num_hidden_layers=8, vocab_size=300, hidden_size=16, **({"layerskip": own} if own else {}))


@pytest.fixture
def trained(tmp_path):
    """The directory of an exit after layer 3 of such a model."""
    Exit(3, torch.ones(16), 8, 300).save(tmp_path / "exit")
    return str(tmp_path / "exit")


def test_nothing_said_is_a_quarter_of_the_layers(tmp_path):
    assert Settings.of({}, config(), str(tmp_path)) == Settings(2, 4, "full")


def test_the_model_says_and_the_user_overrules(tmp_path):
    own = config(exit_layer=3, num_speculations=6)
    assert Settings.of({}, own, str(tmp_path)) == Settings(3, 6, "full")
    assert Settings.of({"exit_layer": 5}, own, str(tmp_path)) == Settings(5, 6, "full")
    assert Settings.of({"num_speculations": 2}, own, str(tmp_path)) == Settings(3, 2, "full")


def test_a_draft_head_beside_the_model_is_taken(tmp_path):
    (tmp_path / "draft_head.safetensors").touch()
    assert Settings.of({}, config(), str(tmp_path)).draft_head == str(tmp_path / "draft_head.safetensors")
    assert Settings.of({"draft_head": "int8"}, config(), str(tmp_path)).draft_head == "int8"


def test_an_exit_brings_its_layer_and_its_head(trained, tmp_path):
    (tmp_path / "draft_head.safetensors").touch()
    own = config(exit_layer=5, num_speculations=6)
    assert Settings.of({"exit": trained}, own, str(tmp_path)) == Settings(3, 4, "exit", exit=trained)
    assert Settings.of({"exit": trained, "draft_head": "int8"}, own, str(tmp_path)).draft_head == "int8"
    assert Settings.of({"exit": trained, "exit_layer": 3}, own, str(tmp_path)).exit_layer == 3


def test_the_model_may_say_its_exit(trained, tmp_path):
    own = config(exit="exit", num_speculations=6)
    assert Settings.of({}, own, str(tmp_path)) == Settings(3, 6, "exit", exit=trained)
    assert Settings.of({"exit_layer": 5}, own, str(tmp_path)) == Settings(5, 6, "full")
    Tuning("auto", 7, "int8", exit=trained).save(tmp_path / "layerskip.json", {})
    assert Settings.of({}, own, str(tmp_path)) == Settings(3, 7, "int8", exit=trained)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (Exit(3, torch.ones(16), 9, 300), {}, r"the exit is for a model of 9 layers, this one has 8"),
        (Exit(3, torch.ones(16), 8, 299), {}, r"the exit is for a model of 299 tokens, this one has 300"),
        (Exit(3, torch.ones(8), 8, 300), {}, r"the exit is for a model of 8 values a state, this one has 16"),
        (Exit(3, torch.ones(16), 8, 300), {"exit_layer": 4}, r"the exit .* follows layer 3, but exit_layer is 4"),
    ],
)
def test_an_exit_that_does_not_fit_is_named(made, options, message, tmp_path):
    made.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        Settings.of({"exit": str(tmp_path), **options}, config(), str(tmp_path))


def test_an_exit_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no exit at .*exit\.safetensors"):
        Settings.of({"exit": str(tmp_path)}, config(), str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit": 3}, r"exit must be a path, or the name of a model that comes with one, got 3"),
        ({"draft_head": "exit"}, r"draft_head must be .* exit \(with an exit\), .* got 'exit'"),
        ({"exit_layer": 0}, r"exit_layer must be in 1 … 7, below the model's last, got 0"),
        ({"exit_layer": 8}, r"got 8"),
        ({"exit_layer": True}, r"got True"),
        ({"exit_layer": "4"}, r"got '4'"),
        ({"num_speculations": 0}, r"num_speculations must be at least 1, got 0"),
        ({"draft_head": "nowhere"}, r"draft_head must be full, int8, vllm, .* or the path .* got 'nowhere'"),
        ({"draft_head": 3}, r"draft_head must be .* got 3"),
        ({"mend_cpu_sampling": "yes"}, r"mend_cpu_sampling must be true or false, got 'yes'"),
    ],
)
def test_what_does_not_fit_is_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Settings.of(options, config(), str(tmp_path))


def test_an_entry_that_is_no_object_is_named():
    with pytest.raises(ValueError, match=r"'layerskip' in the config.json of here must be an object, got 4"):
        Settings.of({}, SimpleNamespace(num_hidden_layers=8, layerskip=4), "here")


def test_options_of_vllm_are_left_to_it():
    assert split({"exit_layer": 2, "enable_multithread_load": True}) == (
        {"exit_layer": 2},
        {"enable_multithread_load": True},
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.0rc1", "0.32.0.dev3+g123"])
def test_supported_versions(version):
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "dev"])
def test_other_versions_are_named_with_the_range(version):
    assert version_problem(version) == (
        f"--load-format layerskip knows the internals of vLLM >=0.32,<0.33; this is vLLM {version}"
    )
