"""Answers of a model, each as a record of JSON, and how much of them there is to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..cli.ways import AUTOREGRESSIVE, EARLY_EXIT
from .engine import Engine, log_likelihoods
from .tasks import PERPLEXITY, Question, Task, encode


class Item(NamedTuple):
    """One question, asked one way."""

    task: str
    question: int
    way: str
    ask: Callable[[], dict[str, Any]]

    @property
    def key(self) -> tuple[str, int, str]:
        """What names it."""
        return self[:3]


def warm_up(engine: Engine, task: Task, question: Question) -> None:
    """Begin an answer every way, so that no clock sees what happens once: caches and pages come to be."""
    ids = encode(engine.tokenizer, question.prompts[:1], task.chat).to(engine.decoder.model.device)
    for way in task.ways:
        engine.generate(ids, way, 8)


def written(engine: Engine, task: Task, questions: Sequence[Question]) -> Iterator[Item]:
    """The answers of a task, the ways in turn for every question, so that a machine's moods meet them all."""
    for index, question in enumerate(questions):
        for way in task.ways:
            yield Item(task.name, index, way, partial(answer, engine, task, question, way))


def scored(engine: Engine, windows: Sequence[Tensor]) -> Iterator[Item]:
    """The log-likelihoods of windows of a text. Self-speculation's are those of the full depth."""
    for index, window in enumerate(windows):
        for way in (AUTOREGRESSIVE, EARLY_EXIT):
            yield Item(PERPLEXITY, index, way, partial(score, engine, window, way))


def answer(engine: Engine, task: Task, question: Question, way: str) -> dict[str, Any]:
    """Write an answer to every prompt of a question, and see what the last one is worth.

    Returns
    -------
    dict
        ``texts``; ``digest``, of all tokens; ``scores``; ``tokens`` and ``seconds`` after the first token of each
        answer; ``rounds``, passes of the full model after that; ``drafted`` and ``accepted`` tokens.
    """
    said: list[str] = []
    outs = []
    for prompt in question.prompts:
        said.append(prompt)
        ids = encode(engine.tokenizer, said, task.chat).to(engine.decoder.model.device)
        outs.append(engine.generate(ids, way, task.new_tokens, task.stops))
        said.append(engine.text(outs[-1], task.stops))
    all_stats = [out.stats for out in outs]
    return {
        "kind": question.kind,
        "texts": said[1::2],
        "digest": hashlib.sha256(str([out.new_tokens.tolist() for out in outs]).encode()).hexdigest()[:16],
        "scores": dict(task.score(question, said[-1])),
        "tokens": sum(stats.new_tokens - 1 for stats in all_stats),
        "seconds": sum(stats.seconds - stats.time_to_first_token for stats in all_stats),
        "rounds": sum(stats.rounds for stats in all_stats),
        "drafted": sum(stats.drafted for stats in all_stats),
        "accepted": sum(stats.accepted for stats in all_stats),
    }


def score(engine: Engine, window: Tensor, way: str) -> dict[str, Any]:
    """The log-likelihood of a window [N] but for its first token, which has nothing before it."""
    model = engine.decoder.model
    found, _ = log_likelihoods(model, window.to(model.device), engine.depth(way))
    return {"log_likelihood": float(found.double().sum()), "tokens": len(found)}


def digest(questions: Mapping[str, Sequence[Question]]) -> str:
    """Of all that is asked, so that answers to other questions are not taken for answers to these."""
    asked = [(name, one.prompts, str(one.reference)) for name, some in questions.items() for one in some]
    return hashlib.sha256(repr(asked).encode()).hexdigest()
