"""What people ask a chat model: the prompts that `benchmarks.sources` decodes, without the chat template."""

from __future__ import annotations

import random
from collections.abc import Callable

from layerskip.training.data import load_task

QUESTIONS = (
    "Why is the sky blue during the day and red in the evening?",
    "I have eggs, spinach and old bread. What can I cook from that?",
    "Explain to a ten-year-old how a vaccine works.",
    "What is the difference between a virus and a bacterium?",
    "Write a short and polite e-mail to my landlord: the heating has been broken for two days.",
    "How do I remove a red wine stain from a cotton shirt?",
    "Plan a weekend in Lisbon for two people who like food and walking.",
    "What should I look at before I buy a used bicycle?",
    "Give me five ideas for a birthday party of a six-year-old in winter.",
    "What does the word 'serendipity' mean? Use it in two sentences.",
    "How does a refrigerator stay cold inside?",
    "I sleep badly before exams. What could help me?",
    "Compare trains and planes for a trip of 600 kilometres.",
    "Who was Marie Curie, and what is she known for?",
    "Write a poem of eight lines about a lighthouse in the fog.",
    "What are the steps to plant tomatoes on a balcony?",
    "Why do cats purr?",
    "How can I politely decline an invitation to a wedding?",
    "What is compound interest? Show it with an example of 100 euros.",
    "List the planets of the solar system and one fact about each.",
    "My laptop has become slow. What can I check first?",
    "What is the capital of Australia, and why is it not Sydney?",
    "Give me a week of simple exercises that need no equipment.",
    "How do noise-cancelling headphones work?",
    "Summarize the story of Romeo and Juliet in a few sentences.",
    "What is the difference between RAM and a hard disk?",
    "How long should I boil an egg so that the yolk is soft?",
    "Write a job advertisement for a baker in a small town.",
    "What are good questions to ask at the end of a job interview?",
    "Explain how rainbows form.",
    "How do I teach a puppy to walk on a leash?",
    "What should be in a first-aid kit for a hike?",
    "Why do leaves change their colour in autumn?",
    "Invent a short bedtime story about a fox who is afraid of the dark.",
    "How do I write a good summary of a long article?",
    "What are the advantages and disadvantages of working from home?",
    "How do tides work, and why are there two each day?",
    "Suggest three names for a café that also sells books, and say why.",
    "What is the difference between weather and climate?",
    "How can I save electricity in a small flat?",
)

_EDITS = (
    "Rewrite this function with type hints. Give the whole function.",
    "Add a comment above every step of this function. Give the whole function.",
    "Rename the variables of this function so that they are easier to understand. Give the whole function.",
    "Add checks of the arguments to this function, and keep the rest as it is. Give the whole function.",
)
_SHOWN = 6  # commands with their parses, before the one to parse
_FUNCTION = (300, 1600)  # characters


def chat() -> list[str]:
    """Questions in our own words."""
    return list(QUESTIONS)


def humaneval() -> list[str]:
    """Chen et al. 2021, as one asks a chat model."""
    return [
        f"Complete this Python function.\n\n```python\n{example.prompt}\n```"
        for example in load_task("coding", "humaneval")
    ]


def rewriting() -> list[str]:
    """Functions of Python's standard library, from modules that no recipe trains on, to be edited."""
    whole = [example.prompt + example.completion for example in load_task("coding", "test")]
    fitting = [code for code in whole if _FUNCTION[0] <= len(code) <= _FUNCTION[1]]
    return [f"{_EDITS[number % len(_EDITS)]}\n\n```python\n{code}\n```" for number, code in enumerate(fitting)]


def summaries() -> list[str]:
    """Abstracts of papers (Takeshita et al. 2024)."""
    abstracts = [example.prompt for example in load_task("summarization", "test")]
    return [
        "Summarize this abstract in three sentences.\n\n" + text.removeprefix("Abstract: ").removesuffix("\nSummary:")
        for text in abstracts
    ]


def commands() -> list[str]:
    """Commands to a smart home, after some with their parses."""
    shown = random.Random(0).sample(load_task("parsing", "train"), _SHOWN)
    examples = "\n".join(example.prompt + " " + example.completion.strip() for example in shown)
    return [
        f"Turn the last command into its parse, as in the examples.\n\n{examples}\n{example.prompt}"
        for example in load_task("parsing", "test")
    ]


TASKS: dict[str, Callable[[], list[str]]] = {
    "HumanEval": humaneval,
    "rewriting code": rewriting,
    "chat": chat,
    "summaries": summaries,
    "commands": commands,
}


def prompts(task: str, limit: int) -> list[str]:
    """At most ``limit`` prompts of a task, spread over all of them."""
    every = TASKS[task]()
    return [every[index * len(every) // limit] for index in range(limit)] if limit < len(every) else every
