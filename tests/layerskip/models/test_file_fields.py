"""Fields of a user's files that have a wrong type or range: the error names file, field and value."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import quantized_checkpoints as layouts
import torch
from exits_of import random_exit
from gguf_files import write
from helpers import save_tiny, tiny_tokenizer
from safetensors.torch import save_file
from tiny import tiny_model

from layerskip import DraftHead, Exit, SelfSpeculativeDecoder, adapt
from layerskip._imports import printable
from layerskip.cli import main
from layerskip.cli.demo import coloured
from layerskip.decoding.tuning import Tuning
from layerskip.models import LayerSkipModel, ModelFileError, UnsupportedModelError, load
from layerskip.models.checkpoints.hf import SETTINGS
from layerskip.models.files import CONFIG, GENERATION, Field
from layerskip.models.loading import save
from layerskip.registry import similar_file
from layerskip.training.run import _adapter

pytestmark = pytest.mark.usefixtures("one_thread")
CLEAR = (ModelFileError, UnsupportedModelError)
WRONG = (
    "x", "", -1, 0, 1.5, 1e300, math.nan, math.inf, 10**30, True, False, [], [-1], ["x", 1], {}, {"x": {}}, None,
)  # fmt: skip
ESCAPE = "\x1b[2J\x1b]0;title\x07"


def paths_of(fields, before=()):
    """Yield the path of each field, nested ones included, and its allowed values."""
    for name, expected in fields.items():
        yield (*before, name), expected
        if not isinstance(expected, Field):
            yield from paths_of(expected, (*before, name))


def named(value):
    return ".".join(value) if isinstance(value, tuple) and not isinstance(value, Field) else ""


def refuses(expected, value):
    if value is None:
        return False
    return not (expected.admits(value) if isinstance(expected, Field) else isinstance(value, dict))


def refusal(path):
    """The error with which a model is refused, or None; other errors than the library's own are not caught."""
    try:
        model, _ = load(path, torch.float32)
        if not isinstance(model, LayerSkipModel):
            adapt(model)
    except CLEAR as error:
        return str(error)
    return None


def fuzz(directory, file, path, expected):
    """Load with each wrong value of one field; whatever its type or range rules out is named."""
    original = (directory / file).read_text()
    *parents, name = path
    for value in WRONG:
        content = json.loads(original)
        owner = content
        for parent in parents:
            owner = owner.setdefault(next(iter(owner)) if parent == "*" else parent, {})
        owner[name] = value
        (directory / file).write_text(json.dumps(content))
        error = refusal(directory)
        if refuses(expected, value):
            assert error is not None, (path, value)
            assert str(directory) in error
            assert f"{name} is {value!r}" in error
    (directory / file).write_text(original)


@pytest.fixture(scope="module", params=["llama2", "gemma3", pytest.param("qwen3moe", marks=pytest.mark.slow)])
def model(request, tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("fields") / "model", request.param)
    return directory


@pytest.mark.parametrize(("path", "expected"), paths_of(CONFIG), ids=named)
def test_config(model, path, expected):
    fields = json.loads((model / "config.json").read_text())
    if path[0] in fields or fields["model_type"] == "llama":  # other families do not read it either
        fuzz(model, "config.json", path, expected)


@pytest.mark.parametrize(("path", "expected"), paths_of(GENERATION), ids=named)
def test_generation_config(model, path, expected):
    fuzz(model, "generation_config.json", path, expected)


LAYOUTS = {
    "gptq": layouts.gptq(4, 32, True), "awq": layouts.awq(32), "fp8": layouts.fine_grained(),
    "compressed-tensors": layouts.compressed("pack-quantized", 4, 32),
}  # fmt: skip


@pytest.mark.parametrize("method", [*LAYOUTS, "compressed-tensors block", "layerskip"])
def test_quantization_config(tmp_path, method):
    if method == "layerskip":
        (tmp_path / "model").mkdir()
        save(adapt(layouts.tiny()).quantize("int8"), tmp_path / "model", tiny_tokenizer())
    else:
        layout = layouts.float8("block") if "block" in method else LAYOUTS[method]
        layouts.write(tmp_path / "model", layouts.tiny(), layout)
    for path, expected in paths_of(SETTINGS[method.partition(" ")[0]]):
        if path[-1] != "*":
            fuzz(tmp_path / "model", "config.json", ("quantization_config", *path), expected)


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "C:\\x",
        5,
        None,
        [],
        {},
        "a\0b",
        ESCAPE + "/x",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_index_that_names_files_elsewhere(tmp_path, name, packed):
    if packed:
        layouts.write(tmp_path / "model", layouts.tiny(), layouts.awq(32))
    else:
        save_tiny(tmp_path / "model")
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "other.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelFileError) as refused:
        load(tmp_path / "model")
    assert f"{index}: weight_map['model.norm.weight'] is {name!r}, expected the name of a file in" in str(refused.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' * 100_000, b"\xff", b"", b"3", b"null"])
def test_json_that_holds_no_object(tmp_path, content):
    directory = save_tiny(tmp_path / "model")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        original = (directory / name).read_bytes()
        (directory / name).write_bytes(content)
        with pytest.raises(ModelFileError, match=name):
            load(directory)
        (directory / name).write_bytes(original)


GGUF_FIELDS = ("general.architecture", *(f"llama.{name}" for name in (
    "attention.head_count", "attention.head_count_kv", "embedding_length", "block_count", "feed_forward_length",
    "context_length", "attention.layer_norm_rms_epsilon", "rope.freq_base", "attention.key_length",
    "rope.dimension_count",
)))  # fmt: skip


@pytest.mark.parametrize("name", GGUF_FIELDS)
def test_metadata_of_gguf(tmp_path, name):
    for number, value in enumerate((None, 0, -1, 3, 1.5, "x", [4, 4], True, float("nan"))):
        path = tmp_path / f"{number}.gguf"
        write(path, layouts.tiny(), {}, changes={name: value})
        error = refusal(path)
        if name == "general.architecture":
            assert error is not None, value
            if not isinstance(value, str):
                found = "missing" if value is None else repr(value)
                assert f"{path}: general.architecture is {found}" in error
        if value in (0, -1) and "count" in name:
            assert error is not None, value
            assert str(path) in error


@pytest.mark.parametrize(
    "factors", [torch.ones(3), torch.zeros(16), torch.full((16,), torch.nan), -torch.ones(16)], ids=str
)
def test_divisors_of_the_rotary_frequencies(tmp_path, factors):
    write(tmp_path / "m.gguf", layouts.tiny(), {}, extra=[("rope_freqs.weight", factors.numpy())])
    with pytest.raises(ModelFileError, match=r"divisors of the rotary frequencies .* above 0"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("size", ["", "-1", "many", "9" * 30, "1e3"])
def test_the_vocabulary_of_a_draft_head(tmp_path, size):
    save_file({"token_ids": torch.tensor([3])}, tmp_path / "draft_head.safetensors", metadata={"vocab_size": size})
    with pytest.raises(ModelFileError, match=rf"draft_head\.safetensors is not a draft head: vocab_size is '{size}'"):
        DraftHead.load(tmp_path)


def test_the_file_of_tune(tmp_path):
    for name in ("exit_layer", "num_speculations", "draft_head", "draft_source", "exit"):
        for value in (0, -1, 1.5, True, [], {}, "x" if name in ("exit_layer", "num_speculations") else 3):
            (tmp_path / "layerskip.json").write_text(json.dumps({name: value}))
            with pytest.raises(ModelFileError) as refused:
                Tuning.load(tmp_path)
            assert f"{tmp_path / 'layerskip.json'}: {name} is {value!r}, expected" in str(refused.value)


@pytest.mark.parametrize("changes", [
    {"r": "x"}, {"r": 0}, {"r": -1}, {"target_modules": 5}, {"target_modules": ["nothing"]}, {"peft_type": ESCAPE},
    {"peft_type": 3}, {"lora_alpha": "x"}, {"rank_pattern": [1]}, {"r": 5},
])  # fmt: skip
def test_the_configuration_of_an_adapter(tmp_path, changes):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelFileError, match=f"cannot read the adapter of {tmp_path}: ") as refused:
        _adapter(tiny_model(), tmp_path)
    assert ESCAPE[0] not in str(refused.value)


class TestPrintable:
    @pytest.mark.parametrize(("text", "escaped"), [
        (ESCAPE, "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\rb\r\n", "a\\rb\r\n"), ("\x9b31m", "\\x9b31m"), ("\u202e", "\\u202e"),
        ("\ud83d", "\\ud83d"), ("täb\t…\n👩‍🚀", "täb\t…\n👩‍🚀"),
    ])  # fmt: skip
    def test_controls_are_escaped(self, text, escaped):
        assert printable(text) == escaped

    @pytest.mark.parametrize("make", [ModelFileError, UnsupportedModelError])
    def test_errors_of_models(self, make):
        assert ESCAPE[0] not in str(make(f"a tensor {ESCAPE}"))

    def test_paths(self, tmp_path):
        directory = save_tiny(tmp_path / "model")
        shard = ESCAPE.replace("/", "")
        index = {"weight_map": {"model.norm.weight": shard}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FileNotFoundError, match=r"\\x1b\[2J.* is missing"):
            load(directory)
        with pytest.raises(FileNotFoundError, match=r"no exit at .*\\x1b\[2J"):
            Exit.load(tmp_path / shard)
        (tmp_path / f"models{shard}").touch()
        assert ESCAPE[0] not in similar_file(tmp_path / f"model{shard}")

    def test_names_in_files(self, tmp_path, capsys):
        """Of a tensor, a method, a shard, an activation and a directory, on standard error."""
        directory = save_tiny(tmp_path / f"model{ESCAPE[:4]}")
        for changes in (
            {"quantization_config": {"quant_method": ESCAPE}},
            {"hidden_act": ESCAPE},
            {"vocab_size": ESCAPE},
        ):
            original = (directory / "config.json").read_text()
            (directory / "config.json").write_text(json.dumps({**json.loads(original), **changes}))
            assert main(["generate", "w1", "--model", str(directory)]) == 2
            (directory / "config.json").write_text(original)
        layouts.write(tmp_path / "packed", layouts.tiny(), layouts.awq(32))
        path = tmp_path / "packed" / "model.safetensors"
        save_file({ESCAPE: torch.ones(1)}, path)
        assert main(["generate", "w1", "--model", str(tmp_path / "packed")]) == 2
        exit_path = random_exit(adapt(tiny_model())).save(tmp_path / f"exit{ESCAPE[:4]}")
        exit_path.write_bytes(b"")
        assert main(["generate", "w1", "--model", str(directory), "--exit", str(exit_path)]) == 2
        assert ESCAPE[0] not in capsys.readouterr().err

    def test_text_of_the_vocabulary(self, tmp_path, capsys, monkeypatch):
        tokenizer = tiny_tokenizer(ESCAPE + "{:03}")
        directory = save_tiny(tmp_path / "model")
        tokenizer.save_pretrained(directory)
        decoder = SelfSpeculativeDecoder(load(directory)[0], 2)
        out = decoder.generate(torch.tensor([[3, 7]]), 8, eos_token_id=[])
        assert ESCAPE[0] not in coloured(tokenizer, out).plain
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        assert main(["generate", "w1", "--model", str(directory), "--max-new-tokens", "8"]) == 0
        printed = capsys.readouterr().out
        assert "\\x1b[2J" in printed
        assert ESCAPE[0] not in printed
