"""`layerskip eval`: its tasks, its report, its cache of answers, its errors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import pytest
import torch
from helpers import save_tiny, tiny_tokenizer
from lm_eval.api.instance import Instance
from tiny import ROUND, generous, requires_native

from layerskip import registry
from layerskip.cli import eval as command
from layerskip.cli import main
from layerskip.evaluation import TASKS, Continuation, LayerSkipLM
from layerskip.models import load
from layerskip.training.data import Example

pytestmark = pytest.mark.usefixtures("one_thread")
STRATEGIES = ["autoregressive", "early_exit", "self_speculative"]
PROMPTS = ["w3 w4", "w5", "w20 w21 w22"]
RECORD = {"task": "t", "kind": None, "filter": "none", "doc_id": 0, "greedy tokens": [[1]]}
DECODING = {"tokens": 12, "seconds": 2.0, "rounds": 4, "drafted": 16, "accepted": 8}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "model"
    return save_tiny(folder, tie_word_embeddings=False, intermediate_size=96)


@pytest.fixture
def examples(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """Examples of the tasks ``parsing`` and ``summarization``: the full depth answers the first two correctly."""
    model, tokenizer = load(directory, torch.float32)
    asked = [Instance("generate_until", {}, (one, {"max_gen_toks": 6}), index) for index, one in enumerate(PROMPTS)]
    said = LayerSkipLM(model, tokenizer=tokenizer).generate_until(asked, disable_tqdm=True)
    made = [Example(prompt, f" {text}\n", prompt) for prompt, text in zip(PROMPTS, [*said[:2], "w7 w7"], strict=True)]
    provider = SimpleNamespace(SPLITS=("train", "test"), load=lambda split: made)
    monkeypatch.setattr(registry, "get", lambda group, name: provider)
    return made


@pytest.fixture
def arguments(directory: Path, examples: list[Example], tmp_path: Path) -> list[str]:
    options = ["--exit-layer", "1", "--num-speculations", "3", "--dtype", "float32", "--max-new-tokens", "6"]
    return ["eval", "parsing", "--model", str(directory), "--output", str(tmp_path / "out.json"), *options]


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def task(name: str) -> lm_eval.api.task.Task:
    return lm_eval.tasks.TaskManager(include_path=TASKS, include_defaults=False).load([name])["tasks"][name]


class TestCommand:
    def test_compares_the_strategies(self, arguments, tmp_path, capsys) -> None:
        assert main(arguments) == 0
        report = json.loads((tmp_path / "out.json").read_text())
        found = report["results"]["parsing"]
        assert list(found) == STRATEGIES
        assert found["autoregressive"]["scores"] == found["self_speculative"]["scores"] == {"exact_match": 2 / 3}
        assert found["early_exit"]["scores"]["exact_match"] < 2 / 3
        assert "tokens_a_round" not in found["autoregressive"]
        drafted = found["self_speculative"]
        assert 1 <= drafted["tokens_a_round"] <= 4
        assert drafted["accepted_a_round"] <= drafted["tokens_a_round"]
        assert report["identical"]
        assert report["settings"]["exit_layer"] == 1
        assert [one["texts"] for one in report["answers"][:3]] == [
            one["filtered_resps"] for one in report["answers"][:3]
        ]
        text = printed(capsys)
        assert "0.666667" in text
        assert "✓ self-speculation gave the tokens of the full depth" in text
        assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
        assert main(arguments) == 2
        assert "out.json exists" in printed(capsys)

    @requires_native
    def test_other_tokens_are_a_failure(self, arguments, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.setattr(ROUND, generous)
        assert main(arguments) == 1
        assert "✗ self-speculation gave other tokens than the full depth: parsing" in printed(capsys)
        assert json.loads((tmp_path / "out.json").read_text())["identical"] is False

    @pytest.mark.slow
    def test_an_interrupted_run_continues(self, arguments, tmp_path, capsys, monkeypatch) -> None:
        make, count = Continuation.of, []

        def stopped(*given):
            if len(count) == 4:
                raise KeyboardInterrupt
            count.append(given)
            return make(*given)

        monkeypatch.setattr(Continuation, "of", stopped)
        assert main(arguments) == 130
        assert f"1 answers (early_exit) are in {tmp_path / 'out.json.partial'}" in printed(capsys)
        assert main([*arguments, "--exit-layer", "2"]) == 2
        assert "exit_layer was 1 and is 2" in printed(capsys)
        folder = Path(arguments[arguments.index("--model") + 1])
        kept = folder.rename(folder.with_name("kept"))
        save_tiny(folder, tie_word_embeddings=False, intermediate_size=96, seed=5)  # another model at the same path
        assert main(arguments) == 2
        assert "digest of the weights was" in printed(capsys)
        shutil.rmtree(folder)
        kept.rename(folder)
        monkeypatch.setattr(Continuation, "of", lambda *given: count.append(given) or make(*given))
        assert main(arguments) == 0
        assert len(count) == 9
        assert len(json.loads((tmp_path / "out.json").read_text())["answers"]) == 9

    @pytest.mark.slow
    def test_a_limit_and_several_tasks(self, arguments, tmp_path) -> None:
        words = tmp_path / "text.txt"
        words.write_text(" ".join(f"w{20 + index % 80}" for index in range(600)))
        arguments[1:2] = ["parsing", "summarization", "spec", "perplexity"]
        assert main([*arguments, "--text", str(words), "--limit", "2"]) == 0
        report = json.loads((tmp_path / "out.json").read_text())
        results = report["results"]
        assert results["parsing"]["autoregressive"]["questions"] == 2
        assert {one["doc_id"] for one in report["answers"] if one["task"] == "spec"} == {0, 15}  # spread over 30
        assert results["spec"]["early_exit"]["scores"] == {}
        assert set(results["spec"]["self_speculative"]["by_kind"]) == {"turns", "math"}
        assert results["summarization"]["autoregressive"]["scores"].keys() == {"rouge1", "rouge2", "rougeL"}
        assert list(results["perplexity"]) == STRATEGIES[:2]
        full, early = (results["perplexity"][name]["scores"] for name in STRATEGIES[:2])
        assert full.keys() == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
        assert full["byte_perplexity"] == pytest.approx(2 ** full["bits_per_byte"])
        assert early["bits_per_byte"] != full["bits_per_byte"]

    @pytest.mark.slow
    def test_a_group_of_local_tasks(self, arguments, tmp_path) -> None:
        (tmp_path / "data.json").write_text(json.dumps({"question": "w3 w4", "answer": "w5"}))
        for name in ("one", "two"):
            (tmp_path / f"{name}.yaml").write_text(
                f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.json}}}}\n"
                "test_split: test\ndoc_to_text: question\ndoc_to_target: answer\n"
                "generation_kwargs: {until: [], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
            )
        (tmp_path / "both.yaml").write_text(
            "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: exact_match}]\n"
        )
        arguments[1] = "both"
        assert main([*arguments, "--include-path", str(tmp_path)]) == 0
        results = json.loads((tmp_path / "out.json").read_text())["results"]
        assert results.keys() == {"both", "one", "two"}
        assert results["both"]["early_exit"]["scores"].keys() == {"exact_match"}
        arguments[1] = str(tmp_path / "one.yaml")
        assert main([*arguments, "--overwrite"]) == 0
        assert json.loads((tmp_path / "out.json").read_text())["results"].keys() == {"one"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--exit-layer", "auto"], "--exit-layer is auto, but an early exit is after a number of layers"),
            (
                ["eval", "humaneval_local"],
                "humaneval_local runs programs that the model has written; --run-code allows",
            ),
            (["--exit-layer", "9"], "exit_layer must be in 1 … 3"),
        ],
    )
    def test_wrong_arguments(self, arguments, capsys, changes, message) -> None:
        changed = [*changes, *arguments[2:]] if changes[0] == "eval" else [*arguments, *changes]
        assert main(changed) == 2
        assert message in printed(capsys)

    @pytest.mark.slow
    def test_tasks_of_lm_eval_are_known_by_name(self, arguments, capsys, monkeypatch) -> None:
        every = lm_eval.tasks.TaskManager(include_path=TASKS)  # takes seconds
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: every)
        for name, message in (
            ("helaswag", "unknown task 'helaswag'; did you mean hellaswag"),
            ("humaneval", "humaneval runs programs that the model has written; --run-code allows it"),
        ):
            arguments[1] = name
            assert main(arguments) == 2
            assert message in printed(capsys)

    def test_a_missing_package_is_named(self, arguments, capsys, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        assert main(arguments) == 2
        assert 'evaluating needs lm_eval: pip install "layerskip-kernels[eval]"' in printed(capsys)


class TestTasks:
    def test_spec_has_its_kinds(self) -> None:
        docs = list(task("spec").test_docs())
        kinds = [doc["kind"] for doc in docs]
        assert {kind: kinds.count(kind) for kind in kinds} == {
            "turns": 10, "writing": 5, "math": 5, "retrieval": 5, "summarization": 5
        }  # fmt: skip
        assert {len(doc["turns"]) for doc in docs if doc["kind"] == "turns"} == {1, 3}
        assert {len(doc["turns"]) for doc in docs if doc["kind"] != "turns"} == {1}
        assert len({tuple(doc["turns"]) for doc in docs}) == 30

    def test_a_conversation_keeps_to_the_chat_template(self, directory: Path) -> None:
        spec, doc = task("spec"), {"turns": ["w3", "w4 w5", "w6"]}
        assert spec.fewshot_context(doc, 0) == "w3\nw4 w5\nw6\n"
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for message in messages %}{{ 'w50 ' if message.role == 'user' else 'w60 ' }}{{ message.content }} "
            "{% endfor %}{% if add_generation_prompt %}w60{% endif %}"
        )
        model = LayerSkipLM(load(directory, torch.float32)[0], tokenizer=tokenizer)
        text = spec.fewshot_context(doc, 0, apply_chat_template=True, chat_template=model.apply_chat_template)
        assert model.tok_encode(text) == [50, 3, 60, 4, 5, 50, 6, 60]

    def test_rouge(self, examples: list[Example]) -> None:
        score = task("summarization").process_results
        doc = {"completion": "the cats sat on the mat"}
        assert score(doc, ["the cat sat on the mat"]) == dict.fromkeys(("rouge1", "rouge2", "rougeL"), 1.0), "stems"
        part = score(doc, ["the mat the cat"])
        assert part["rouge1"] == pytest.approx(0.8)  # 4 of 4 words occur, of 6: 2 · 1 · ⅔ / (1 + ⅔)
        assert part["rouge2"] == pytest.approx(0.5)  # 2 of 3 pairs, of 5
        assert part["rougeL"] == pytest.approx(0.4)  # 2 words in order

    def test_humaneval_runs_programs(self) -> None:
        humaneval = task("humaneval_local")
        assert humaneval.UNSAFE_CODE
        docs = list(humaneval.test_docs())
        assert len(docs) == 164
        for doc in (docs[0], docs[38], docs[163]):
            assert doc["prompt"] == doc["prompt"].rstrip()
            assert humaneval.process_results(doc, ["\n" + doc["canonical_solution"]]) == {"pass@1": 1.0}
            assert humaneval.process_results(doc, ["\n    return None\n"]) == {"pass@1": 0.0}

    def test_a_function_ends_where_something_else_begins(self, directory: Path) -> None:
        until = task("humaneval_local").config.generation_kwargs["until"]
        assert {"\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```"} == set(until)

    @pytest.mark.slow
    def test_humaneval_from_the_command(self, arguments, tmp_path) -> None:
        """A model of words writes no Python."""
        arguments[1] = "humaneval_local"
        assert main([*arguments, "--run-code", "--limit", "2"]) == 0
        results = json.loads((tmp_path / "out.json").read_text())["results"]["humaneval_local"]
        assert [results[name]["scores"] for name in STRATEGIES] == [{"pass@1": 0.0}] * 3

    def test_every_task_is_offered_in_the_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["eval", "--help"])
        text = printed(capsys)
        assert all(path.stem in text for path in TASKS.glob("*.yaml"))


class TestSummary:
    def test_rates_are_those_of_all_answers(self) -> None:
        more = {"tokens": 4, "seconds": 2.0, "rounds": 4, "drafted": 16, "accepted": 0}
        found = command.decoding_of([{"decoding": DECODING}, {"decoding": more}])
        drafts = {"drafts_accepted": 0.25, "accepted_a_round": 1.0, "tokens_a_round": 2.0}
        assert found == {"questions": 2, "tokens": 16, "tokens_per_second": 4.0, **drafts}

    def test_an_answer_of_one_token_has_no_speed(self) -> None:
        alone = {**RECORD, "decoding": dict.fromkeys(DECODING, 0)}
        summary = command.summarize({"m,none": 0.5, "m_stderr,none": "N/A", "sample_len": 1}, [alone])
        assert summary["scores"] == {"m": 0.5}
        assert summary["tokens_per_second"] == 0.0
        assert [table.row_count for table in command.tables({"t": dict.fromkeys(STRATEGIES, summary)})] == [1, 1]

    def test_differing_answers_are_named(self) -> None:
        answers = [
            {**RECORD, "doc_id": number, "strategy": strategy, "greedy tokens": [[token]]}
            for number, strategy, token in (
                (0, "autoregressive", 5), (0, "self_speculative", 5),
                (3, "autoregressive", 5), (3, "self_speculative", 6), (3, "early_exit", 7),
            )
        ]  # fmt: skip
        assert command.differing(answers) == ["t 3"]
