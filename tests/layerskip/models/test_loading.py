"""Loading from disk, and model files that are not as they should be."""

import json
import shutil
import socket

import pytest
import torch
import transformers
from helpers import save_tiny, tiny_model

from layerskip.models import ModelFileError, UnsupportedModelError, adapt, load
from layerskip.models.loading import _check_keys


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


class TestLoad:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gives_the_model_and_its_tokenizer(self, saved, dtype):
        hf, tokenizer = load(saved, dtype)
        assert hf.dtype == dtype
        assert not hf.training
        assert tokenizer("w3 w7").input_ids == [3, 7]
        expected = tiny_model("llama2", dtype)
        assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), expected.parameters(), strict=True))

    def test_sharded(self, tmp_path):
        directory = save_tiny(tmp_path / "sharded", max_shard_size="50KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
        assert adapt(load(str(directory))[0]).num_layers == 4
        shard = sorted(directory.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
            load(directory)

    def test_a_directory_needs_no_network(self, saved, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a connection was attempted")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        load(str(saved))
        load(saved)

    @pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model-directory", "some/where/absent"])
    def test_missing_directory(self, name, monkeypatch):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args: pytest.fail("a connection was attempted"))
        with pytest.raises(FileNotFoundError, match=r"no such directory: .*absent"):
            load(name)

    def test_a_file_or_an_empty_directory(self, saved, tmp_path):
        with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
            load(saved / "config.json")
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            load(tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            lambda data: data[:5],
            lambda data: b"",
            lambda data: data[:16] + bytes(16) + data[32:],
            lambda data: b"\xff" * 8 + data[8:],
            lambda data: data + b"trailing",
        ],
        ids=["half", "last byte", "five bytes", "empty", "header", "header size", "trailing"],
    )
    def test_damaged_weights(self, directory, damage):
        path = directory / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ModelFileError, match=r"model\.safetensors is truncated or corrupt \(\d+ bytes\)"):
            load(directory)

    def test_missing_weights_file(self, directory):
        (directory / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
            load(directory)

    @pytest.mark.parametrize(
        "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    )
    def test_damaged_json(self, directory, name):
        path = directory / name
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ModelFileError, match=f"{name} is not valid JSON"):
            load(directory)
        path.write_text("[1]")
        with pytest.raises(ModelFileError, match=f"{name} holds a list"):
            load(directory)

    def test_missing_or_useless_tokenizer(self, directory):
        (directory / "tokenizer.json").write_text('{"a": 1}')
        with pytest.raises(ModelFileError, match=f"tokenizer of {directory}"):
            load(directory)
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").unlink()
        with pytest.raises(ModelFileError, match=f"tokenizer of {directory}"):
            load(directory)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"num_hidden_layers": 5}, ModelFileError, r"lacks 9 weights .*model\.layers\.4"),
            ({"num_hidden_layers": 3}, ModelFileError, r"has 9 weights .* does not use.*model\.layers\.3"),
            ({"vocab_size": 90}, ModelFileError, r"of shape \[101, 32\], its config.json asks for \[90, 32\]"),
            ({"num_attention_heads": 5}, ModelFileError, r"(?s)configuration of .*\(5\)"),
            ({"hidden_size": "abc"}, ModelFileError, r"config\.json: hidden_size is 'abc', expected an integer"),
            ({"model_type": "gpt2"}, UnsupportedModelError, "model_type 'gpt2' is not supported; supported: llama"),
            ({"model_type": "unheard_of"}, UnsupportedModelError, "'unheard_of'"),
            ({"hidden_act": "relu"}, UnsupportedModelError, "hidden_act 'relu'"),
            ({"quantization_config": {"quant_method": "hqq"}}, UnsupportedModelError, "quantised with hqq"),
            ({"quantization_config": {"quant_method": "awq"}}, ModelFileError, "says awq, but no weight in the files"),
            ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedModelError, "dynamic"),
        ],
    )  # fmt: skip
    def test_configuration_that_does_not_fit(self, directory, changes, error, message):
        edit(directory / "config.json", **changes)
        with pytest.raises(error, match=message):
            load(directory)

    def test_transformers_4_does_not_tell_the_shapes(self):
        info = {"mismatched_keys": ["lm_head.weight"], "missing_keys": [], "unexpected_keys": []}
        with pytest.raises(ModelFileError, match=r"m has lm_head\.weight of another shape than its config\.json"):
            _check_keys("m", info)

    def test_an_index_without_a_map(self, directory):
        (directory / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(ModelFileError, match="no weight_map"):
            load(directory)

    def test_a_name_that_cannot_be_fetched(self, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("no connection")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
        with pytest.raises(ModelFileError, match="configuration of some/model: no connection"):
            load("some/model")
