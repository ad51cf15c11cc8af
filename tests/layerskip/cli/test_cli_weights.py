"""The commands with packed weights, and ``layerskip quantize``."""

from __future__ import annotations

import json
import re

import pytest
import quantized_checkpoints as layouts
import torch
from helpers import tiny_tokenizer
from tiny import requires_native

from layerskip.cli import arguments, main, options
from layerskip.models import adapt, load
from layerskip.models.loading import NATIVE
from layerskip.training.exit_analysis import perplexity
from layerskip_kernels.formats import FORMATS

pytestmark = [pytest.mark.usefixtures("one_thread"), requires_native]
TEXT = " ".join(f"w{(7 * number) % 90}" for number in range(1500))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = layouts.tiny(dtype=torch.bfloat16, max_position_embeddings=600)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def packed(directory, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("packed") / "model")
    assert main(["quantize", directory, "--weights", "int8", "--windows", "0", "--output", path]) == 0
    return path


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def test_the_names_are_those_of_the_library():
    assert tuple(FORMATS) == arguments.FORMATS
    assert arguments.NATIVE == NATIVE


class TestQuantize:
    def test_writes_what_loads_and_tells_the_perplexity(self, directory, tmp_path, text, capsys):
        output = tmp_path / "out"
        options = ["--weights", "int4", "--text", text, "--windows", "2", "--output", str(output)]
        assert main(["quantize", directory, *options]) == 0
        told = capsys.readouterr().out
        model, tokenizer = load(output)
        expected = adapt(load(directory)[0]).quantize("int4")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        before, after = (float(number) for number in re.findall(r"(\d+\.\d+) (?:before|after)", told))
        assert after == pytest.approx(perplexity(model, tokenizer, [TEXT], limit=2), abs=1e-3)
        assert before == pytest.approx(perplexity(load(directory)[0], tokenizer, [TEXT], limit=2), abs=1e-3)
        assert before != after
        assert f"wrote {output}: int4+int8, 0 MB of weights" in told
        assert f"({after / before - 1:+.2%})" in told

    def test_the_default_text_is_there(self, directory, tmp_path, capsys):
        output = str(tmp_path / "out")
        assert main(["quantize", directory, "--weights", "fp8", "--windows", "1", "--output", output]) == 0
        assert "tokens of Python's manual" in capsys.readouterr().out

    def test_without_a_perplexity_the_same(self, directory, packed):
        expected = adapt(load(directory)[0]).quantize("int8")
        model, _ = load(packed)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))

    def test_a_packed_checkpoint_of_others_becomes_our_own(self, tmp_path, capsys):
        layouts.write(tmp_path / "awq", layouts.tiny(), layouts.awq(32))
        arguments = ["--weights", "native", "--output", str(tmp_path / "own")]
        assert main(["quantize", str(tmp_path / "awq"), *arguments]) == 0
        assert ": bfloat16+int4_zero, " in capsys.readouterr().out
        one, other = load(tmp_path / "awq")[0], load(tmp_path / "own")[0]
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    def test_an_output_that_is_there(self, directory, tmp_path, packed, capsys):
        again = ["quantize", directory, "--weights", "int4", "--windows", "0", "--output", packed]
        assert main(again) == 2
        assert "exists; give another name, or --overwrite" in capsys.readouterr().err
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        assert main([*again[:-1], str(tmp_path / "mine"), "--overwrite"]) == 2
        assert "was not written by layerskip" in capsys.readouterr().err
        assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"

    def test_overwriting(self, directory, tmp_path):
        output = str(tmp_path / "out")
        given = ["quantize", directory, "--windows", "0", "--output", output]
        assert main([*given, "--weights", "int8"]) == 0
        assert main([*given, "--weights", "int4", "--overwrite"]) == 0
        assert load(output)[0].weights == "int4+int8"

    def test_a_calibration_text(self, directory, tmp_path, text):
        output = tmp_path / "out"
        given = ["--weights", "int4", "--windows", "0", "--calibration", text, "--output", str(output)]
        assert main(["quantize", directory, *given]) == 0
        model, tokenizer = load(output)
        pieces = torch.tensor(tokenizer(TEXT).input_ids).split(256)
        expected = adapt(load(directory)[0]).quantize("int4", calibration=pieces)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        to_nearest = adapt(load(directory)[0]).quantize("int4")
        assert not torch.equal(model.decoder.layer(0).q, to_nearest.decoder.layer(0).q)

    def test_errors(self, directory, packed, tmp_path, capsys):
        output = str(tmp_path / "out")
        assert main(["quantize", packed, "--weights", "int8", "--output", output]) == 2
        assert "are packed already, in int8" in capsys.readouterr().err
        assert main(["quantize", directory, "--weights", "native", "--output", output]) == 2
        assert "has plain weights; give --weights one of int8, " in capsys.readouterr().err
        (tmp_path / "empty.txt").write_text("")
        given = ["--calibration", str(tmp_path / "empty.txt"), "--output", output]
        assert main(["quantize", directory, "--weights", "int4", *given]) == 2
        assert "empty.txt holds no text to calibrate with" in capsys.readouterr().err
        assert main(["quantize", packed, "--weights", "native", *given]) == 2
        assert "leave it out with --weights native" in capsys.readouterr().err
        assert main(["quantize", packed, "--weights", "int8", "--windows", "0", "--output", output]) == 2
        assert "quantized already (layerskip)" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["quantize", directory, "--weights", "int5", "--output", output])
        assert "unknown weight format 'int5'; did you mean int" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestCommands:
    """On a model that is packed as it is loaded, and on one that was written packed."""

    @pytest.fixture(params=["--weights", "packed"])
    def given(self, request, directory, packed):
        return ["--model", directory, "--weights", "int8"] if request.param == "--weights" else ["--model", packed]

    @pytest.fixture
    def prompts(self, tmp_path):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w8 w13"}\n{"prompt": "w2 w3"}\n')
        return ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "8"]

    def test_generate(self, given, capsys):
        texts = []
        for strategy in ("autoregressive", "self_speculative"):
            assert main(["generate", "w5 w8", *given, "--strategy", strategy, "--max-new-tokens", "8"]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]
        assert texts[0].strip()

    def test_bench(self, given, prompts, tmp_path, capsys):
        stem = tmp_path / "bench"
        assert main(["bench", *given, *prompts, "--batch-sizes", "2", "--output", str(stem)]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "int8 in bfloat16" in told
        report = json.loads(stem.with_suffix(".json").read_text())
        assert report["settings"]["weights"] == "int8"
        assert set(report["summary"]) == {"autoregressive", "self-speculative"}
        assert report["identical"]

    def test_bench_of_plain_weights_names_them(self, directory, prompts, tmp_path):
        stem = tmp_path / "bench"
        assert main(["bench", "--model", directory, *prompts, "--only-ours", "--output", str(stem)]) == 0
        assert json.loads(stem.with_suffix(".json").read_text())["settings"]["weights"] == "bfloat16"

    def test_correctness(self, given, prompts, capsys):
        assert main(["correctness", *given, *prompts]) == 0
        told = capsys.readouterr().out
        assert "all tokens are identical" in told
        assert "(int8)" in told

    def test_exits(self, given, prompts, tmp_path, capsys):
        assert main(["exits", *given, *prompts, "--output", str(tmp_path / "exits")]) == 0
        assert "in int8" in " ".join(capsys.readouterr().out.split())
        assert (tmp_path / "exits.png").stat().st_size > 1000

    def test_distill_and_tune(self, packed, prompts, tmp_path):
        output = str(tmp_path / "pairs.jsonl")
        assert main(["distill", "--model", packed, *prompts, "--output", output]) == 0
        tuned = tmp_path / "tuned.json"
        assert main(["tune", packed, *prompts, "--output", str(tuned)]) == 0
        assert "weights" in json.loads(tuned.read_text())["measured"]

    def test_what_takes_plain_weights_only(self, packed, tmp_path, capsys):
        output = ["--exit-layer", "2", "--output", str(tmp_path / "draft")]
        assert main(["export", "--model", packed, *output]) == 2
        assert "layerskip export takes plain weights" in capsys.readouterr().err
        assert main(["train", "--set", f"model={packed}", "--set", f"output={tmp_path / 'run'}"]) == 2
        assert "a LayerSkipModel (weights int8) was given" in capsys.readouterr().err


def test_loading_tells_how_far_it_is(directory, monkeypatch):
    class Watched:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, text):
            seen.append(text)

        def status(self, text):
            return self

    seen = []
    args = arguments.parse(["generate", "x", "--model", directory, "--weights", "int8"])
    options.load(args, Watched())
    assert re.search(r"(\d+) of \1 weights$", seen[-1])
