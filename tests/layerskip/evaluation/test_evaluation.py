"""The model class of lm-eval: log-likelihoods against transformers, texts against the decoder, whole local tasks."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_tiny, tiny_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.utils import normalize_gen_kwargs
from tiny import prompt_of, tiny_model

from layerskip.decoding import SelfSpeculativeDecoder
from layerskip.evaluation import Continuation, GenerationOptions, LayerSkipLM, log_likelihoods
from layerskip.models import adapt, load
from layerskip.training.exit_analysis import perplexity

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("w003 w004", " w005 w006"), ("w020", " w021 w022 w023"), ("", "w007 w008"), ("w009 w030 w031", " w003")]
GIVEN = {
    "until": ["x"],
    "max_gen_toks": 7,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
}
STRATEGIES = [({}, 4), ({"exit_layer": 2}, 2), ({"exit_layer": 2, "num_speculations": 3}, 4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose texts tokenize back to the tokens they were decoded from."""
    made = save_tiny(tmp_path_factory.mktemp("evaluation") / "model", tie_word_embeddings=False, intermediate_size=96)
    tiny_tokenizer("w{:03}").save_pretrained(made)
    return str(made)


def made(directory: object, **changes: object) -> LayerSkipLM:
    return LayerSkipLM(directory, dtype="float32", device="cpu", **changes)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@torch.no_grad()
def in_double(directory: str, ids: list[int], depth: int) -> torch.Tensor:
    """ln p [N - 1, V] of the float64 model of transformers after ``depth`` layers."""
    model = load(directory, torch.float32)[0].double()
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    logits = out.logits[0] if depth == 4 else model.lm_head(model.model.norm(out.hidden_states[depth]))[0]
    return logits[:-1].log_softmax(-1)


class TestLogLikelihoods:
    @pytest.mark.parametrize(("arguments", "depth"), STRATEGIES)
    def test_continuations_match_transformers(self, directory: str, arguments: dict, depth: int) -> None:
        model = made(directory, **arguments)
        found = model.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
        for (context, text), (value, greedy) in zip(PAIRS, found, strict=True):
            ids = [*(model.tok_encode(context) or [1]), *model.tok_encode(text)]
            count = len(model.tok_encode(text))
            expected = in_double(directory, ids, depth)[-count:]
            labels = torch.tensor(ids[-count:])
            assert value == pytest.approx(float(expected.gather(1, labels[:, None]).sum()), abs=2e-5)  # fp32 sums
            assert greedy == bool((expected.argmax(-1) == labels).all())

    @pytest.mark.parametrize(("arguments", "depth"), STRATEGIES[:2])
    def test_long_texts_are_scored_in_windows(self, directory: str, arguments: dict, depth: int) -> None:
        """Each token is scored once, with as much context as fits."""
        ids = [20 + (7 * index) % 80 for index in range(20)]
        text = " ".join(f"w{one:03}" for one in ids)
        model = made(directory, max_length=8, **arguments)
        (found,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
        whole, expected = [1, *ids], 0.0
        for first, last in ((0, 8), (8, 16), (16, 20)):  # of the tokens that a window scores
            begin = max(0, last - 8)
            rows = in_double(directory, whole[begin : last + 1], depth)[first - begin :]
            expected += float(rows.gather(1, torch.tensor(ids[first:last])[:, None]).sum())
        assert found == pytest.approx(expected, abs=2e-5)

    def test_greedy_text_is_reported_as_greedy(self, directory: str) -> None:
        model = made(directory, exit_layer=1)
        (text,) = model.generate_until(asked("generate_until", ("w003 w004", {"max_gen_toks": 5})), disable_tqdm=True)
        ((_, greedy),) = model.loglikelihood(asked("loglikelihood", ("w003 w004", f" {text}")), disable_tqdm=True)
        assert greedy

    def test_too_long_continuation_is_refused(self, directory: str) -> None:
        model = made(directory, max_length=3)
        with pytest.raises(ValueError, match="a continuation of 4 tokens; expected 1 … max_length=3"):
            model.loglikelihood(asked("loglikelihood", ("w003", " w004 w005 w006 w007")), disable_tqdm=True)

    @pytest.mark.parametrize("num_layers", [1, 2, 4])
    @pytest.mark.parametrize("architecture", ["llama3", "qwen3"])
    def test_every_depth_matches_transformers(self, architecture: str, num_layers: int) -> None:
        """fp32 against float64: sums of 40 terms with errors of 1e-7 each."""
        model, ids = tiny_model(architecture), prompt_of(300 % 256)[0]
        found, greedy = log_likelihoods(adapt(model), ids, num_layers, start=4)
        double = tiny_model(architecture).double()
        with torch.no_grad():
            out = double(input_ids=ids[None], output_hidden_states=True)
            state = out.hidden_states[num_layers] if num_layers < 4 else None
            logits = out.logits[0] if state is None else double.lm_head(double.model.norm(state))[0]
        expected = logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]][3:]
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
        assert torch.equal(greedy, logits[3:-1].argmax(-1) == ids[4:])

    @pytest.mark.parametrize("weights", [None, "int8"])
    def test_same_perplexity_as_the_training_package(self, directory: str, weights: str | None) -> None:
        model, tokenizer = load(directory, torch.float32, weights)
        text = " ".join(f"w{20 + (7 * index) % 80:03}" for index in range(50))
        ours = adapt(model) if weights is None else model
        windows = torch.tensor(tokenizer(text).input_ids).split(25)

        def at(num_layers: int) -> float:
            values = torch.cat([log_likelihoods(ours, window, num_layers)[0] for window in windows])
            assert len(values) == 48
            return math.exp(-float(values.double().mean()))

        expected = perplexity(model, tokenizer, [text], window=25)
        assert at(4) == pytest.approx(expected, rel=1e-3 if weights else 1e-5)
        assert at(2) != pytest.approx(expected, rel=1e-2)


class TestGeneration:
    CONTEXTS = ("w003 w004", "w005", "w020 w021 w022", "w040 w041")

    @pytest.mark.parametrize(("arguments", "strategy"), [
        ({}, "autoregressive"), ({"exit_layer": 2}, "early_exit"),
        ({"exit_layer": 2, "num_speculations": 3}, "autoregressive"),
        ({"draft_source": "ngram", "num_speculations": "auto"}, "autoregressive"),
    ])  # fmt: skip
    def test_same_as_the_decoder(self, directory: str, arguments: dict, strategy: str) -> None:
        model = made(directory, batch_size=3, **arguments)
        requests = asked("generate_until", *((one, {"until": ["nothing"], "max_gen_toks": 9}) for one in self.CONTEXTS))
        texts = model.generate_until(requests, disable_tqdm=True)
        own, tokenizer = load(directory, torch.float32)
        decoder = SelfSpeculativeDecoder(own, 2)
        for context, text in zip(self.CONTEXTS, texts, strict=True):
            ids = tokenizer(context, return_tensors="pt").input_ids
            expected = decoder.generate(ids, 9, strategy, 2).new_tokens[0]
            assert tokenizer(text).input_ids == [token for token in expected.tolist() if token != 1]

    def test_continuations_keep_tokens_and_statistics_in_the_cache_of_lm_eval(
        self, directory: str, tmp_path: Path
    ) -> None:
        arguments = ("w003 w004", {"until": [], "max_gen_toks": 9})
        texts = []
        for _ in range(2):
            model = made(directory, exit_layer=2, num_speculations=3)
            cached = CachingLM(model, str(tmp_path / "answers.db"))
            texts += cached.generate_until(asked("generate_until", arguments))
            cached.dbdict.close()
        fresh, kept = texts
        assert fresh == kept
        assert isinstance(kept, Continuation)
        assert vars(fresh) == vars(kept)
        assert kept.greedy
        assert kept.stats["tokens"] == len(kept.tokens) - 1 == kept.stats["accepted"] + kept.stats["rounds"]

    def test_stop_strings_and_room(self, directory: str) -> None:
        model = made(directory, max_length=16)
        whole = model.generate_until(asked("generate_until", ("w003", {"max_gen_toks": 8})), disable_tqdm=True)[0]
        stop = whole.split()[3]
        cut, long = model.generate_until(
            asked("generate_until", ("w003", {"until": [stop], "max_gen_toks": 8}),
                  (" ".join(["w009"] * 40 + ["w003"]), {"max_gen_toks": 15})),
            disable_tqdm=True,
        )  # fmt: skip
        assert cut == whole[: whole.index(stop)]
        assert long.startswith(whole)
        with pytest.raises(ValueError, match="an answer of 16 tokens leaves no room in max_length=16"):
            model.generate_until(asked("generate_until", ("w003", {"max_gen_toks": 16})), disable_tqdm=True)

    def test_generation_options(self) -> None:
        wanted = GenerationOptions.of({"until": "x", "max_new_tokens": 7, "do_sample": True, "top_k": 3}, 99)
        assert (wanted.until, wanted.max_new_tokens) == (["x"], 7)
        assert (wanted.sampling.temperature, wanted.sampling.top_k) == (1.0, 3)
        assert GenerationOptions.of({"do_sample": False, "temperature": 0.7}, 99).sampling.greedy
        assert GenerationOptions.of({"temperature": 0.7}, 99).sampling.temperature == 0.7
        assert GenerationOptions.of({}, 99).sampling.greedy
        assert GenerationOptions.of({}, 99).max_new_tokens == 99
        with pytest.raises(ValueError, match="that layerskip does not support: num_beams"):
            GenerationOptions.of({"num_beams": 4, "use_cache": True}, 99)
        assert GenerationOptions.of({"num_beams": 1, "repetition_penalty": 1.0}, 99).sampling.greedy

    def test_an_empty_stop_string_cuts_nothing(self, directory: str) -> None:
        assert GenerationOptions.of({"until": ["", "x"]}, 9).until == ["x"]
        assert GenerationOptions.of({"until": ""}, 9).until == []
        options = ({"max_gen_toks": 6}, {"max_gen_toks": 6, "until": [""]})
        requests = asked("generate_until", *(("w003", one) for one in options))
        plain, empty = made(directory).generate_until(requests, disable_tqdm=True)
        assert plain == empty
        assert len(plain.split()) > 1

    @pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
    def test_names_of_the_length(self, name: str) -> None:
        """The first one given counts, as in lm-eval."""
        assert GenerationOptions.of({name: 7}, 99).max_new_tokens == 7
        both = GenerationOptions.of({"max_completion_tokens": 5, name: 7}, 99)
        assert both.max_new_tokens == 7
        assert normalize_gen_kwargs({"max_completion_tokens": 5, name: 7}, 99)["max_gen_toks"] == 7

    @pytest.mark.parametrize("name", [*GIVEN, "max_completion_tokens", "num_beams"])
    def test_none_counts_as_not_given(self, name: str) -> None:
        others = {other: value for other, value in GIVEN.items() if other != name}
        assert GenerationOptions.of({**others, name: None}, 99) == GenerationOptions.of(others, 99)


def test_a_loaded_model_is_taken_as_it_is(directory: str) -> None:
    model, tokenizer = load(directory, torch.float32)
    text = asked("generate_until", ("w003", {"max_gen_toks": 6}))
    loaded = made(model, tokenizer=tokenizer, exit_layer=1)
    assert loaded.generate_until(text, disable_tqdm=True) == made(directory, exit_layer=1).generate_until(text)


def test_registered_beside_the_models_of_lm_eval() -> None:
    registry = importlib.import_module("lm_eval.api.registry")
    assert registry.get_model("layerskip") is LayerSkipLM
    assert {"layerskip", "hf"} <= set(registry.model_registry)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_speculations": 4}, "num_speculations needs a draft source: give exit_layer, exit or draft_source"),
        ({"draft_head": "int8", "exit_layer": 2}, "draft_head is for drafts; give num_speculations, too"),
        ({"parallelize": True}, "unknown model argument parallelize; expected one of exit, draft_head"),
        ({"exit_layer": 4}, "exit_layer must be in 1 … 3"),
        ({"exit_layer": "auto"}, "an early exit needs a number of layers, got exit_layer=auto"),
    ],
)
def test_wrong_arguments(directory: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(directory, **arguments)


def local_tasks(folder: Path) -> Path:
    """Two tasks on local files: a choice of two words, and generated text."""
    lines = [{"question": f"w{n:03} w{n + 1:03}", "choices": ["w005", "w060"], "answer": n % 2} for n in range(3, 9)]
    (folder / "data.json").write_text("\n".join(map(json.dumps, lines)))
    data = (f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'data.json'}\ntest_split: test\n"
            'doc_to_text: "{{question}}"\n')  # fmt: skip
    choice = (
        "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n- metric: acc\n"
    )
    written = ('output_type: generate_until\ndoc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["w009"]\n'
               "  max_gen_toks: 6\nmetric_list:\n- metric: exact_match\n")  # fmt: skip
    for name, rest in (("tiny_choice", choice), ("tiny_written", written)):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{rest}")
    return folder


@pytest.mark.slow
def test_the_command_on_local_tasks(directory: str, tmp_path: Path) -> None:
    """In a process of its own, without a network."""
    folder = local_tasks(tmp_path)
    arguments = ["--model", "layerskip", "--model_args", f"pretrained={directory},exit_layer=2,dtype=float32",
                 "--tasks", "tiny_choice,tiny_written", "--include_path", str(folder), "--device", "cpu",
                 "--output_path", str(tmp_path / "out"), "--log_samples"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "layerskip.evaluation", *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert set(results) == {"tiny_choice", "tiny_written"}
    model = made(directory, exit_layer=2)
    pairs = [(f"w{n:03} w{n + 1:03}", f" {word}") for n in range(3, 9) for word in ("w005", "w060")]
    values = [value for value, _ in model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)]
    right = [(values[2 * row + 1] > values[2 * row]) == bool((row + 3) % 2) for row in range(6)]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / 6)
