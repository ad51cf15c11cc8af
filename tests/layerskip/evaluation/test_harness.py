"""The model class of lm_eval: log-likelihoods against transformers', texts against the decoder's, whole local tasks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_tiny, tiny_tokenizer

from layerskip.decoding import SelfSpeculativeDecoder
from layerskip.models import load

lm_eval = pytest.importorskip("lm_eval", reason='needs lm_eval: pip install "layerskip-kernels[lm-eval]"')
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

from layerskip.evaluation.harness import LayerSkipLM, Wanted  # noqa: E402

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
WAYS = [({}, 4), ({"exit_layer": 2}, 2), ({"exit_layer": 2, "num_speculations": 3}, 4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Whose words read back as the tokens that they are."""
    made = save_tiny(tmp_path_factory.mktemp("harness") / "model", tie_word_embeddings=False)
    tiny_tokenizer("w{:03}").save_pretrained(made)
    return str(made)


def made(directory: str, **changes: object) -> LayerSkipLM:
    return LayerSkipLM(directory, dtype="float32", device="cpu", **changes)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@torch.no_grad()
def in_double(directory: str, ids: list[int], depth: int) -> torch.Tensor:
    """ln p [N - 1, V] of transformers' float64 model after so many layers."""
    model = load(directory, torch.float32)[0].double()
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    logits = out.logits[0] if depth == 4 else model.lm_head(model.model.norm(out.hidden_states[depth]))[0]
    return logits[:-1].log_softmax(-1)


class TestLogLikelihoods:
    @pytest.mark.parametrize(("arguments", "depth"), WAYS)
    def test_of_continuations(self, directory: str, arguments: dict, depth: int) -> None:
        model = made(directory, **arguments)
        found = model.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
        for (context, text), (value, greedy) in zip(PAIRS, found, strict=True):
            ids = [*(model.tok_encode(context) or [1]), *model.tok_encode(text)]
            count = len(model.tok_encode(text))
            expected = in_double(directory, ids, depth)[-count:]
            labels = torch.tensor(ids[-count:])
            assert value == pytest.approx(float(expected.gather(1, labels[:, None]).sum()), abs=2e-5)  # fp32 sums
            assert greedy == bool((expected.argmax(-1) == labels).all())

    @pytest.mark.parametrize(("arguments", "depth"), WAYS[:2])
    def test_of_texts_that_are_longer_than_the_model_takes(self, directory: str, arguments: dict, depth: int) -> None:
        """Each token once, with as much before it as there is room for."""
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

    def test_greedy_text_is_called_greedy(self, directory: str) -> None:
        model = made(directory, exit_layer=1)
        (text,) = model.generate_until(asked("generate_until", ("w003 w004", {"max_gen_toks": 5})), disable_tqdm=True)
        ((_, greedy),) = model.loglikelihood(asked("loglikelihood", ("w003 w004", f" {text}")), disable_tqdm=True)
        assert greedy

    def test_what_is_too_long_is_named(self, directory: str) -> None:
        model = made(directory, max_length=3)
        with pytest.raises(ValueError, match="a continuation of 4 tokens; expected 1 … max_length=3"):
            model.loglikelihood(asked("loglikelihood", ("w003", " w004 w005 w006 w007")), disable_tqdm=True)


class TestTexts:
    CONTEXTS = ("w003 w004", "w005", "w020 w021 w022", "w040 w041")

    @pytest.mark.parametrize(("arguments", "strategy"), [
        ({}, "autoregressive"), ({"exit_layer": 2}, "early_exit"),
        ({"exit_layer": 2, "num_speculations": 3}, "autoregressive"),
        ({"draft_source": "ngram", "num_speculations": "auto"}, "autoregressive"),
    ])  # fmt: skip
    def test_they_are_the_decoders(self, directory: str, arguments: dict, strategy: str) -> None:
        model = made(directory, batch_size=3, **arguments)
        requests = asked("generate_until", *((one, {"until": ["nothing"], "max_gen_toks": 9}) for one in self.CONTEXTS))
        texts = model.generate_until(requests, disable_tqdm=True)
        own, tokenizer = load(directory, torch.float32)
        decoder = SelfSpeculativeDecoder(own, 2)
        for context, text in zip(self.CONTEXTS, texts, strict=True):
            ids = tokenizer(context, return_tensors="pt").input_ids
            expected = decoder.generate(ids, 9, strategy, 2).new_tokens[0]
            assert tokenizer(text).input_ids == [token for token in expected.tolist() if token != 1]

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

    def test_what_a_request_may_say(self) -> None:
        wanted = Wanted({"until": "x", "max_new_tokens": 7, "do_sample": True, "top_k": 3}, 99)
        assert (wanted.until, wanted.new_tokens) == (["x"], 7)
        assert (wanted.sampling.temperature, wanted.sampling.top_k) == (1.0, 3)
        assert Wanted({"do_sample": False, "temperature": 0.7}, 99).sampling.greedy
        assert Wanted({"temperature": 0.7}, 99).sampling.temperature == 0.7
        assert Wanted({}, 99).sampling.greedy
        assert Wanted({}, 99).new_tokens == 99
        with pytest.raises(ValueError, match="that layerskip does not have: num_beams"):
            Wanted({"num_beams": 4, "use_cache": True}, 99)
        assert Wanted({"num_beams": 1, "repetition_penalty": 1.0}, 99).sampling.greedy

    def test_an_empty_stop_string_cuts_nothing(self, directory: str) -> None:
        assert Wanted({"until": ["", "x"]}, 9).until == ["x"]
        assert Wanted({"until": ""}, 9).until == []
        options = ({"max_gen_toks": 6}, {"max_gen_toks": 6, "until": [""]})
        requests = asked("generate_until", *(("w003", one) for one in options))
        plain, empty = made(directory).generate_until(requests, disable_tqdm=True)
        assert plain == empty
        assert len(plain.split()) > 1

    @pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
    def test_lengths_have_the_names_that_lm_eval_knows(self, name: str) -> None:
        """The first of them counts, as there."""
        assert Wanted({name: 7}, 99).new_tokens == 7
        both = Wanted({"max_completion_tokens": 5, name: 7}, 99)
        assert both.new_tokens == 7
        assert normalize_gen_kwargs({"max_completion_tokens": 5, name: 7}, 99)["max_gen_toks"] == 7

    @pytest.mark.parametrize("name", [*GIVEN, "max_completion_tokens", "num_beams"])
    def test_none_is_not_given(self, name: str) -> None:
        others = {other: value for other, value in GIVEN.items() if other != name}
        assert vars(Wanted({**others, name: None}, 99)) == vars(Wanted(others, 99))


def test_it_is_known_beside_lm_evals_own() -> None:
    registry = importlib.import_module("lm_eval.api.registry")
    assert registry.get_model("layerskip") is LayerSkipLM
    assert {"layerskip", "hf"} <= set(registry.model_registry)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_speculations": 4}, "num_speculations needs what drafts: give exit_layer, exit or draft_source"),
        ({"draft_head": "int8", "exit_layer": 2}, "draft_head is for drafts; give num_speculations, too"),
        ({"parallelize": True}, "unknown model argument parallelize; expected one of exit, draft_head"),
        ({"exit_layer": 4}, "exit_layer must be in 1 … 3"),
        ({"exit_layer": "auto"}, "an early exit is after a number of layers, got exit_layer=auto"),
    ],
)
def test_arguments_that_cannot_be(directory: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(directory, **arguments)


def local_tasks(folder: Path) -> Path:
    """Two tasks on files: which of two words is likelier, and what is written."""
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
    """By its name alone, in a process of its own, without a network."""
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
