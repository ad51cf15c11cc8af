"""Conversations in the model's chat template: code, code to rewrite, passages to summarize, commands, and questions.

Every one is a first message, and the model may write the answer (`layerskip distill`). The texts in them come from the
splits of `coding`, `summarization`, `text` and `parsing`; the questions are made from `topics` and split by topic. A
conversation is one way, out of several, to ask for a thing, drawn once for every text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layerskip.training.data import Example

from . import coding, parsing, summarization, text
from ._splits import stable_fraction
from .topics import ASKED, GENERAL, PLACES, QUESTIONS, TASKS, TOPICS

SPLITS = ("train", "test")
TEST_SHARE = 0.1  # of the topics, places and programming tasks
COMMANDS = 0.3  # of the commands of `parsing`; their answers are all alike

_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_FUNCTIONS = (
    "{}",
    "Complete this function.\n\n{}",
    "Complete the following Python function:\n\n```python\n{}\n```",
    "Complete the following Python function. Answer with code only.\n\n{}",
    "Write the body of this Python function:\n\n{}",
    "Here is the signature and docstring of a function. Implement it.\n```python\n{}\n```",
)
_ASKED = (
    "Write a Python function that {}.",
    "Write a Python program that {}. Explain it briefly.",
    "Show me Python code that {}, with an example of its use.",
    "How do I write a function that {}?",
)
_REWRITES = (
    "Add type hints to this function.\n\n{}",
    "Rewrite this function with clearer names and return the whole function:\n\n```python\n{}\n```",
    "Add comments to the code below.\n\n```python\n{}\n```",
    "Refactor this code so that it is easier to read:\n\n{}",
    "Add error handling to this function. Keep everything else as it is.\n\n```python\n{}\n```",
    "Rewrite the following function. Add a docstring and type hints.\n\n{}",
    "Repeat this function, but print a message at its beginning.\n\n```python\n{}\n```",
    "Explain what this function does.\n\n{}",
    "Fix any bugs in this function and return the corrected code:\n\n{}",
)
_SUMMARIES = (
    "Abstract: {}\nSummary:",
    "Summarize this abstract in three sentences: {}",
    "Summarize the following text.\n\n{}",
    "{}\n\nSummarize the text above.",
    "Write a short summary of this passage:\n\n{}",
    "What is the main point of this text?\n\n{}",
    "List the key points of this passage:\n\n{}",
)
_COMMANDS = (
    "Command: {}\nParse:",
    "Command: {}",
    "{}",
    "Turn this command into JSON with an intent and its slots: {}",
    "Parse this home automation command into an intent and slots: {}",
    "Parse the last command as the others are parsed.\n\n{examples}\nCommand: {}\nParse:",
    "{examples}\nCommand: {}\nParse:",
    "These are commands and their parses. What is the parse of the last one?\n{examples}\nCommand: {}\nParse:",
)
SHOWN = 4  # examples, in those that have some


def load(split: str) -> list[Example]:
    """Conversations of ``split``, without completions, in an order in which all kinds are mixed.

    ``group`` is the kind: ``code``, ``rewriting``, ``summaries``, ``commands`` or ``questions``. The code of ``test``
    is HumanEval's; no text of ``test`` is in ``train``.
    """
    made = [
        Example(template(message), "", kind)
        for kind, messages in (
            ("code", _code(split)),
            ("rewriting", _rewriting(split)),
            ("summaries", _summaries(split)),
            ("commands", _commands(split)),
            ("questions", _questions(split)),
        )
        for message in messages
    ]
    return sorted({example.prompt: example for example in made}.values(), key=lambda one: stable_fraction(one.prompt))


def template(message: str) -> str:
    """A message in the chat template of SmolLM2-Instruct, up to where the assistant answers."""
    return f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"


def _one_way(ways: Sequence[str], content: str, **others: str) -> str:
    """The content in one of the ways to ask, drawn by the content."""
    return ways[int(stable_fraction(f"way {content}") * len(ways))].format(content, **others)


def _kept(name: str, split: str) -> bool:
    return (stable_fraction(name) < TEST_SHARE) == (split == "test")


def _code(split: str) -> Iterator[str]:
    for function in coding.load("humaneval" if split == "test" else split):
        yield _one_way(_FUNCTIONS, function.prompt)
    for task in TASKS:
        if _kept(task, split):
            yield from (way.format(task) for way in _ASKED)


def _rewriting(split: str) -> Iterator[str]:
    for function in coding.load(split):
        yield _one_way(_REWRITES, function.prompt + function.completion)


def _summaries(split: str) -> Iterator[str]:
    for passage in summarization.load("test" if split == "test" else "excerpts"):
        yield _one_way(_SUMMARIES, passage.prompt.removeprefix("Abstract: ").removesuffix("\nSummary:"))
    if split == "train":
        for passage in text.load(split):
            yield _one_way(_SUMMARIES, passage.completion)


def _commands(split: str) -> Iterator[str]:
    known = parsing.load("train")
    for command in parsing.load(split):
        if split == "test" or stable_fraction(f"kept {command.prompt}") < COMMANDS:
            text = command.prompt.removeprefix("Command: ").removesuffix("\nParse:")
            first = int(stable_fraction(f"shown {text}") * (len(known) - SHOWN * 997))
            shown = known[first : first + SHOWN * 997 : 997]  # far apart, so of different templates
            yield _one_way(_COMMANDS, text, examples="\n".join(one.prompt + one.completion for one in shown))


def _questions(split: str) -> Iterator[str]:
    for subjects, questions in ((TOPICS, QUESTIONS), (PLACES, GENERAL)):
        for subject in subjects:
            if _kept(subject, split):
                yield from (question.format(subject) for question in questions)
    yield from (question for question in ASKED if _kept(question, split))
