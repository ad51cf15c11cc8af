"""`layerskip eval`: what is asked, what answers are worth, what is kept and written; and log-likelihoods."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import save_tiny, tiny_tokenizer
from tiny import ROUND, generous, prompt_of, requires_native, tiny_model

from layerskip.cli import main
from layerskip.cli.arguments import EVALUATIONS
from layerskip.cli.ways import AUTOREGRESSIVE, EARLY_EXIT, SELF_SPECULATIVE
from layerskip.decoding import SelfSpeculativeDecoder
from layerskip.evaluation import answers, summary, tasks
from layerskip.evaluation.engine import Engine, continuation, log_likelihoods
from layerskip.models import adapt, load
from layerskip.training.data import Example
from layerskip.training.exit_analysis import perplexity

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = [AUTOREGRESSIVE, EARLY_EXIT, SELF_SPECULATIVE]
PROMPTS = ["w3 w4", "w5", "w20 w21 w22"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        save_tiny(tmp_path_factory.mktemp("evaluated") / "model", tie_word_embeddings=False, intermediate_size=96)
    )


@pytest.fixture
def examples(directory: str, monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """Three, of which the full depth answers the first two as it should."""
    model, tokenizer = load(directory, torch.float32)
    engine = Engine(SelfSpeculativeDecoder(model, 1), tokenizer, 1)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    said = [engine.text(engine.generate(one, AUTOREGRESSIVE, 6)) for one in ids]
    made = [Example(prompt, f" {text}\n", prompt) for prompt, text in zip(PROMPTS, [*said[:2], "w7 w7"], strict=True)]
    monkeypatch.setattr(tasks, "load_task", lambda task, split: made)
    return made


@pytest.fixture
def arguments(directory: str, examples: list[Example], tmp_path) -> list[str]:
    options = ["--exit-layer", "1", "--num-speculations", "3", "--dtype", "float32", "--max-new-tokens", "6"]
    return ["eval", "parsing", "--model", directory, "--output", str(tmp_path / "out.json"), *options]


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


class TestCommand:
    def test_every_way_is_asked_and_told(self, arguments, tmp_path, capsys) -> None:
        assert main(arguments) == 0
        report = json.loads((tmp_path / "out.json").read_text())
        ways = report["results"]["parsing"]
        assert list(ways) == WAYS
        assert ways[AUTOREGRESSIVE]["scores"] == ways[SELF_SPECULATIVE]["scores"] == {"exact match": 2 / 3}
        assert ways[EARLY_EXIT]["scores"]["exact match"] < 2 / 3
        assert "tokens_a_round" not in ways[AUTOREGRESSIVE]
        drafted = ways[SELF_SPECULATIVE]
        assert 1 <= drafted["tokens_a_round"] <= 4
        assert drafted["accepted_a_round"] <= drafted["tokens_a_round"]
        assert report["identical"]
        assert report["settings"]["exit_layer"] == 1
        told = printed(capsys)
        assert "66.7%" in told
        assert "✓ self-speculation gave the tokens of the full depth" in told
        assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
        assert main(arguments) == 2
        assert "out.json exists" in printed(capsys)

    @requires_native
    def test_other_tokens_are_a_failure(self, arguments, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.setattr(ROUND, generous)
        assert main(arguments) == 1
        assert "✗ self-speculation gave other tokens than the full depth: parsing" in printed(capsys)
        assert json.loads((tmp_path / "out.json").read_text())["identical"] is False

    def test_an_interrupt_loses_nothing(self, arguments, tmp_path, capsys, monkeypatch) -> None:
        answer, asked = answers.answer, []

        def stopped(engine, task, question, way):
            if len(asked) == 4:
                raise KeyboardInterrupt
            asked.append((question.prompts, way))
            return answer(engine, task, question, way)

        monkeypatch.setattr(answers, "answer", stopped)
        assert main(arguments) == 130
        assert f"4 of 9 answers are in {tmp_path / 'out.json.partial'}" in printed(capsys)
        assert main([*arguments, "--exit-layer", "2"]) == 2
        assert "exit_layer was 1 and is 2" in printed(capsys)
        folder = Path(arguments[arguments.index("--model") + 1])
        kept = folder.rename(folder.with_name("kept"))
        save_tiny(folder, tie_word_embeddings=False, intermediate_size=96, seed=5)  # another model at the same path
        assert main(arguments) == 2
        assert "digest of the weights was" in printed(capsys)
        shutil.rmtree(folder)
        kept.rename(folder)
        monkeypatch.setattr(answers, "answer", lambda *asked_: asked.append(asked_[2:]) or answer(*asked_))
        assert main(arguments) == 0
        assert len(asked) == 9
        assert len(json.loads((tmp_path / "out.json").read_text())["answers"]) == 9

    def test_a_limit_and_several_tasks(self, arguments, tmp_path) -> None:
        words = tmp_path / "text.txt"
        words.write_text(" ".join(f"w{20 + index % 80}" for index in range(600)))
        arguments[1:2] = ["parsing", "spec", "perplexity"]
        assert main([*arguments, "--text", str(words), "--limit", "2"]) == 0
        results = json.loads((tmp_path / "out.json").read_text())["results"]
        assert results["parsing"][AUTOREGRESSIVE]["questions"] == 2
        assert set(results["spec"]) == {AUTOREGRESSIVE, SELF_SPECULATIVE}
        assert set(results["spec"][SELF_SPECULATIVE]["by_kind"]) == {"turns", "math"}
        assert results["perplexity"][AUTOREGRESSIVE]["windows"] == 1
        assert results["perplexity"][AUTOREGRESSIVE] != results["perplexity"][EARLY_EXIT]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--exit-layer", "auto"], "--exit-layer is auto, but an early exit is after a number of layers"),
            (["eval", "humaneval"], "humaneval runs programs that the model has written; --run-code allows it"),
            (["--exit-layer", "9"], "exit_layer must be in 1 … 3"),
        ],
    )
    def test_what_cannot_be(self, arguments, capsys, changes, message) -> None:
        changed = [*changes, *arguments[2:]] if changes[0] == "eval" else [*arguments, *changes]
        assert main(changed) == 2
        assert message in printed(capsys)

    def test_humaneval_runs_what_was_written(self, arguments, tmp_path, monkeypatch) -> None:
        """A model of words writes no Python, so nothing passes; with tests that any name passes, all does."""
        problem = {"test": "def check(given): pass", "entry_point": "print"}
        made = [tasks.Question(("w3 = 1; w4",), problem), tasks.Question(("#",), problem)]
        monkeypatch.setitem(tasks.WRITTEN, "humaneval", tasks.Task("humaneval", lambda: made, 4, tasks._passes))
        arguments[1] = "humaneval"
        assert main([*arguments, "--run-code"]) == 0
        scores = json.loads((tmp_path / "out.json").read_text())["results"]["humaneval"][AUTOREGRESSIVE]["scores"]
        assert scores == {"pass@1": 0.5}

    def test_names(self) -> None:
        assert set(EVALUATIONS) == {*tasks.WRITTEN, tasks.PERPLEXITY}


class TestTasks:
    def test_spec_has_its_kinds(self) -> None:
        questions = tasks.WRITTEN["spec"].questions()
        kinds = [question.kind for question in questions]
        assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
            ("turns", "writing", "math", "retrieval", "summarization"), 5
        )
        assert all(len(question.prompts) == (2 if question.kind == "turns" else 1) for question in questions)
        assert len({question.prompts for question in questions}) == 25

    def test_a_second_turn_goes_on_from_the_first_answer(self, directory) -> None:
        model, tokenizer = load(directory, torch.float32)
        asked, decoder = [], SelfSpeculativeDecoder(model, 1)
        generate = decoder.generate
        decoder.generate = lambda ids, *rest, **named: asked.append(ids[0].tolist()) or generate(ids, *rest, **named)
        task = tasks.Task("two", list, 4, chat=True)
        engine = Engine(decoder, tokenizer, 1)
        record = answers.answer(engine, task, tasks.Question(("w3", "w9 w8")), AUTOREGRESSIVE)
        first = tokenizer(record["texts"][0]).input_ids
        assert asked == [[3], [3, *first, 9, 8]]
        assert record["tokens"] == 6

    def test_a_chat_template_is_kept_to(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for message in messages %}{{ 'w50 ' if message.role == 'user' else 'w60 ' }}{{ message.content }} "
            "{% endfor %}{% if add_generation_prompt %}w60{% endif %}"
        )
        assert tasks.encode(tokenizer, ["w3", "w4 w5", "w6"], True).tolist() == [[50, 3, 60, 4, 5, 50, 6, 60]]
        assert tasks.encode(tokenizer, ["w3", "w4 w5", "w6"], False).tolist() == [[6]]

    def test_rouge(self) -> None:
        pytest.importorskip("rouge_score", reason='needs rouge-score: pip install "layerskip-kernels[eval]"')
        score = tasks.WRITTEN["summarization"].score
        question = tasks.Question(("",), "the cats sat on the mat")
        assert score(question, "the cat sat on the mat") == dict.fromkeys(tasks.ROUGE, 1.0), "stems are compared"
        part = score(question, "the mat the cat")
        assert part["rouge1"] == pytest.approx(0.8)  # 4 of 4 words are there, of 6: 2 · 1 · ⅔ / (1 + ⅔)
        assert part["rouge2"] == pytest.approx(0.5)  # 2 of 3 pairs, of 5
        assert part["rougeL"] == pytest.approx(0.4)  # 2 words in order

    def test_a_function_ends_where_something_else_begins(self, directory) -> None:
        tokenizer = tiny_tokenizer()
        assert continuation(tokenizer, [3], [4, 5, 6, 7], ["w6"]) == continuation(tokenizer, [3], [4, 5], []) + " "


class TestLogLikelihoods:
    @pytest.mark.parametrize("depth", [1, 2, 4])
    @pytest.mark.parametrize("architecture", ["llama3", "qwen3"])
    def test_they_are_transformers(self, architecture: str, depth: int) -> None:
        """In fp32, against transformers' states in float64 and their logits; sums of 40 terms of 1e-7 each."""
        model, ids = tiny_model(architecture), prompt_of(300 % 256)[0]
        found, greedy = log_likelihoods(adapt(model), ids, depth, start=4)
        double = tiny_model(architecture).double()
        with torch.no_grad():
            out = double(input_ids=ids[None], output_hidden_states=True)
            state = out.hidden_states[depth] if depth < 4 else None
            logits = out.logits[0] if state is None else double.lm_head(double.model.norm(state))[0]
        expected = logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]][3:]
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
        assert torch.equal(greedy, logits[3:-1].argmax(-1) == ids[4:])

    @pytest.mark.parametrize("weights", [None, "int8"])
    def test_perplexity_is_that_of_the_training_package(self, directory, weights, tmp_path) -> None:
        model, tokenizer = load(directory, torch.float32, weights)
        texts = [" ".join(f"w{20 + (7 * index) % 80}" for index in range(50))]
        ours = adapt(model) if weights is None else model
        windows = torch.tensor(tokenizer(texts[0]).input_ids).split(25)
        engine = Engine(SelfSpeculativeDecoder(ours, 2), tokenizer, 2)
        records = [
            {"task": item.task, "question": item.question, "way": item.way, "answer": item.ask()}
            for item in answers.scored(engine, windows)
        ]
        found = summary.summarize(records)[tasks.PERPLEXITY]
        expected = perplexity(model, tokenizer, texts, window=25)
        assert found[AUTOREGRESSIVE]["perplexity"] == pytest.approx(expected, rel=1e-3 if weights else 1e-5)
        assert found[EARLY_EXIT]["perplexity"] != pytest.approx(expected, rel=1e-2)
        assert found[AUTOREGRESSIVE]["tokens"] == 48


ANSWER = {
    "kind": "",
    "digest": "a",
    "scores": {"m": 1.0},
    "tokens": 12,
    "seconds": 2.0,
    "rounds": 4,
    "drafted": 16,
    "accepted": 8,
}


def record(question: int, way: str, **changes: object) -> dict:
    return {"task": "t", "question": question, "way": way, "answer": {**ANSWER, **changes}}


class TestSummary:
    def test_means(self) -> None:
        more = record(1, SELF_SPECULATIVE, scores={"m": 0.0}, tokens=4, seconds=2.0, rounds=4, accepted=0)
        way = summary.summarize([record(0, SELF_SPECULATIVE), more])["t"][SELF_SPECULATIVE]
        drafts = {"drafts_accepted": 0.25, "accepted_a_round": 1.0, "tokens_a_round": 2.0}
        assert way == {"questions": 2, "scores": {"m": 0.5}, "tokens": 16, "tokens_per_second": 4.0, **drafts}

    def test_an_answer_of_one_token_has_no_speed(self) -> None:
        alone = record(0, AUTOREGRESSIVE, tokens=0, seconds=0.0, rounds=0, drafted=0, accepted=0)
        results = summary.summarize([alone])
        assert results["t"][AUTOREGRESSIVE]["tokens_per_second"] == 0.0
        assert summary.tables(results)[0].row_count == 1

    def test_what_differs_is_named(self) -> None:
        pairs = [(0, AUTOREGRESSIVE, "a"), (0, SELF_SPECULATIVE, "a"), (3, AUTOREGRESSIVE, "a")]
        pairs += [(3, SELF_SPECULATIVE, "b"), (3, EARLY_EXIT, "c")]
        assert summary.differing([record(number, way, digest=digest) for number, way, digest in pairs]) == ["t 3"]

    def test_perplexity_is_exp_of_the_mean(self) -> None:
        found = ({"log_likelihood": -6.0, "tokens": 2}, {"log_likelihood": -3.0, "tokens": 1})
        records = [{"task": "perplexity", "way": AUTOREGRESSIVE, "answer": one} for one in found]
        assert summary.summarize(records)["perplexity"][AUTOREGRESSIVE]["perplexity"] == pytest.approx(math.exp(3))
