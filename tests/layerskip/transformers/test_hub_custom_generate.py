"""``custom_generate=<folder>``: the folder that goes to the hub, loaded by transformers from a path."""

import inspect
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from tiny import prompt_of, tiny_model

import layerskip
from layerskip import SelfSpeculativeDecoder

FOLDER = Path(__file__).parents[3] / "examples/custom_generate"
pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = {"input_ids": prompt_of(9), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 3}


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    """Where transformers copies the folder's code to: not into the user's cache."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model():
    return tiny_model(upper="weak")


def test_the_folder_gives_the_tokens_of_greedy_decoding(model, monkeypatch):
    """And its own arguments reach the decoder."""
    given = []

    def generate(self, *args, **named):
        given.append((named["exit_layer"], named["num_speculations"]))
        return decode(self, *args, **named)

    decode = SelfSpeculativeDecoder.generate
    monkeypatch.setattr(SelfSpeculativeDecoder, "generate", generate)
    expected = model.generate(**INPUTS)
    assert given == []
    own = {"custom_generate": str(FOLDER), "trust_remote_code": True, "exit_layer": 2, "num_speculations": 4}
    assert torch.equal(model.generate(**INPUTS, **own), expected)
    assert given == [(2, 4)]


def test_what_cannot_be_honoured_is_refused_through_the_folder_too(model):
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(**INPUTS, custom_generate=str(FOLDER), trust_remote_code=True, num_beams=2)


def test_it_runs_for_those_who_trust_it_alone(model):
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**INPUTS, custom_generate=str(FOLDER), trust_remote_code=False)


def test_a_requirement_that_is_not_there_is_named(model, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "copy")
    (folder / "custom_generate/requirements.txt").write_text("layerskip-kernels>99\n")
    with pytest.raises(ImportError, match="layerskip-kernels>99"):
        model.generate(**INPUTS, custom_generate=str(folder), trust_remote_code=True)


def test_the_card_tells_the_arguments():
    card = (FOLDER / "README.md").read_text()
    own = set(inspect.signature(layerskip.generate).parameters) - set(
        inspect.signature(transformers.GenerationMixin.generate).parameters
    )
    listed = set(re.findall(r"^- `(\w+)`", card, re.MULTILINE))
    assert listed == own - {"model", "input_ids", "tokenizer", "model_kwargs"}
    assert "tags:\n  - custom_generate\n" in card
