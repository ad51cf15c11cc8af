"""Decoding with drafts from different sources, against autoregressive decoding, on what people ask a chat model.

    python -m benchmarks.sources [--limit 20] [--tasks chat summaries] [--sources exit ngram auto] [--exit DIR]

Every prompt goes through the model's chat template, and is decoded in every way in turn, so that whatever else runs on
the machine disturbs all of them alike. A way's speed is that after the first token. Its speedup is the ratio of all
tokens over all seconds; beside it stands the median of the prompts' ratios. Greedy tokens must be identical. On a
machine that others use, ``--cpu-time --threads 1`` counts the seconds that the process computed, not those it waited.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from layerskip import GenerationOutput, SamplingParams, SelfSpeculativeDecoder
from layerskip._files import write_atomically
from layerskip.cli.options import encode
from layerskip.cli.rendering import Drafts
from layerskip.models import gather_weights, load
from layerskip.training.data import load_task

from .harness import machine
from .tables import markdown_table

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


@dataclass
class Way:
    """A decoding method and its results."""

    name: str
    options: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rounds: int = 0
    drafts: Drafts = field(default_factory=Drafts)
    texts: list[list[int]] = field(default_factory=list)
    decoder: SelfSpeculativeDecoder | None = None

    def take(self, out: GenerationOutput) -> None:
        """Note what a prompt gave."""
        stats = out.stats
        self.tokens.append(stats.new_tokens - 1)
        self.seconds.append(stats.seconds - stats.time_to_first_token)
        self.rounds += stats.rounds
        self.texts.append(out.new_tokens[0].tolist())
        self.drafts = Drafts.sum((self.drafts, Drafts.of(stats)))

    def row(self, task: str, plain: Way, repeated: float) -> dict[str, Any]:
        """By the names of `COLUMNS`."""
        speed, other = (sum(one.tokens) / sum(one.seconds) for one in (self, plain))
        pairs = zip(self.tokens, self.seconds, plain.tokens, plain.seconds, strict=True)
        ratios = [(tokens / mine) / (others / its) for tokens, mine, others, its in pairs if tokens and others]
        values = (task, self.name, speed, speed / other, median(ratios), sum(self.tokens) / self.rounds,
                  str(self.drafts), repeated, self.texts == plain.texts)  # fmt: skip
        more = {"smallest": min(ratios), "prompts": len(self.tokens), **asdict(self.drafts)}
        return {**dict(zip(COLUMNS, values, strict=True)), **more}


def repeated_share(prompt: Sequence[int], text: Sequence[int], length: int = 4) -> tuple[int, int]:
    """How many n-grams of ``text`` occurred before, in it or in its prompt; and how many there are."""
    whole, first = [*prompt, *text], len(prompt)
    seen, again = set(), 0
    for end in range(length, len(whole) + 1):
        gram = tuple(whole[end - length : end])
        again += end > first + length - 1 and gram in seen
        seen.add(gram)
    return again, max(0, len(text) - length + 1)


def measure(args: argparse.Namespace, model: Any, tokenizer: Any, task: str) -> list[dict[str, Any]]:
    """The rows of one task: the plain way, then the sources."""
    speculative = {"num_speculations": args.num_speculations}
    ways = [Way(PLAIN, {"strategy": PLAIN})]
    ways += [Way(source, {"draft_source": source, **speculative}) for source in args.sources]
    for way in ways:  # each learns for itself
        way.decoder = SelfSpeculativeDecoder(
            model, args.exit_layer, max_seq_len=args.max_seq_len, draft_head=args.draft_head, exit=args.exit
        )
        way.decoder.clock = time.process_time if args.cpu_time else time.perf_counter
    room = args.max_seq_len - args.max_new_tokens
    encoded = [encode(tokenizer, text, model.device, chat=True) for text in prompts(task, 4 * args.limit)]
    encoded = [ids for ids in encoded if ids.shape[1] <= room]
    encoded = [encoded[index * len(encoded) // args.limit] for index in range(min(args.limit, len(encoded)))]
    repeats = [0, 0]
    for number, ids in enumerate(encoded):
        order = ways[number % len(ways) :] + ways[: number % len(ways)]
        sampling = SamplingParams(temperature=args.temperature, seed=number)
        for way in order:
            assert way.decoder is not None
            if number == 0:
                way.decoder.generate(ids, 4, sampling=sampling, **way.options)  # pages and caches
            way.take(way.decoder.generate(ids, args.max_new_tokens, sampling=sampling, **way.options))
        found = repeated_share(ids[0].tolist(), ways[0].texts[-1])
        repeats = [total + count for total, count in zip(repeats, found, strict=True)]
    share = repeats[0] / repeats[1] if repeats[1] else 0.0
    return [way.row(task, ways[0], share) for way in ways]


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sources", nargs="+", default=["ngram", "auto"])
    parser.add_argument("--exit", help="a trained exit: a file or directory, or a name")
    parser.add_argument("--exit-layer", type=_number_or_auto, help="by default that of --exit, or auto")
    parser.add_argument("--draft-head", choices=("full", "int8"))
    parser.add_argument("--num-speculations", type=_number_or_auto, default="auto")
    parser.add_argument("--limit", type=int, default=20, help="prompts of each task")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--max-seq-len", type=int, default=1024, help="longer prompts are left out")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--cpu-time", action="store_true", help="measure the process's time, not the wall's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sources"), help="for .json and .md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; write JSON and Markdown after every task. 1 where greedy tokens differ."""
    args = _parsed(arguments)
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model)
    gather_weights(model)  # as `from_pretrained` does
    rows: list[dict[str, Any]] = []
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        rows += measure(args, model, tokenizer, task)
        print(markdown(rows[-1 - len(args.sources) :]), flush=True)
        report = {"machine": machine(), "settings": settings, "rows": rows}
        write_atomically(args.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
        write_atomically(args.output.with_suffix(".md"), page(report).encode())
    return 0 if args.temperature or all(row["identical"] for row in rows) else 1


PLAIN = "autoregressive"
COLUMNS = (
    "task",
    "way",
    "tokens/s",
    "speedup",
    "median",
    "tokens a round",
    "accepted",
    "repeated 4-grams",
    "identical",
)
GOALS = {"HumanEval": 2.0, "rewriting code": 1.9, "chat": 1.4, "summaries": 1.4, "commands": 2.0}
"""The speedups that "auto" aims at, in greedy decoding."""
WAY = "auto"  # whose rounds the page describes
_SHAPES = {"tokens/s": "{:.0f}", "speedup": "{:.2f}×", "median": "{:.2f}×", "tokens a round": "{:.2f}",
           "repeated 4-grams": "{:.0%}"}  # fmt: skip
Rows = Sequence[Mapping[str, Any]]


def markdown(rows: Rows) -> str:
    """A line for each task and way."""
    return markdown_table(COLUMNS, ([_cell(name, row[name]) for name in COLUMNS] for row in rows)) + "\n"


def page(report: Mapping[str, Any]) -> str:
    """Return the Markdown page of a run: speedups by task, then a row for each task and way."""
    parts = ["# Draft sources\n", f"{_head(report)}\n", markdown(report["rows"])]
    if WAY in report["settings"]["sources"]:
        parts.insert(2, _compared(report))
    return "\n".join(parts)


def _head(report: Mapping[str, Any]) -> str:
    where, given = report["machine"], report["settings"]
    options = [f"--exit {given['exit']}", f"--sources {' '.join(given['sources'])}", f"--limit {given['limit']}"]
    options += [f"--threads {given['threads']}"]
    options += [f"--temperature {given['temperature']}"] * bool(given["temperature"])
    options += ["--cpu-time"] * given["cpu_time"]
    plain = [row["tokens/s"] for row in report["rows"] if row["way"] == PLAIN]
    machine = f"{where['cpu']}, {where['isa']}, {where['threads']} threads"
    speed = f"autoregressive decoding {min(plain):.0f} to {max(plain):.0f} tokens/s"
    return (
        f"{machine}, {given['max_new_tokens']} new tokens, {speed} "
        f"(`python -m benchmarks.sources {' '.join(options)}`):"
    )


def _compared(report: Mapping[str, Any]) -> str:
    """A line for each task: the speedups of all ways, the fastest in bold, and what the rounds of one were like."""
    ways = report["settings"]["sources"]
    found = {(row["task"], row["way"]): row for row in report["rows"]}
    greedy = not report["settings"]["temperature"]
    names = ["task", *ways, f"{WAY}, tokens a round", f"{WAY}'s drafts accepted, by place in the round",
             "repeated 4-grams", *["goal"] * greedy]  # fmt: skip
    lines = []
    for task in dict.fromkeys(task for task, _ in found):
        speeds = [found[task, way]["speedup"] for way in ways]
        cells = [_cell("speedup", speed) for speed in speeds]
        cells = [f"**{cell}**" if speed == max(speeds) else cell for cell, speed in zip(cells, speeds, strict=True)]
        row = found[task, WAY]
        more = [_cell(name, row[name]) for name in ("tokens a round", "accepted", "repeated 4-grams")]
        reached = "met" if row["speedup"] >= GOALS[task] else "missed"
        lines.append([task, *cells, *more, *[f"{GOALS[task]:.1f}×, {reached}"] * greedy])
    return markdown_table(names, lines) + "\n"


def _cell(name: str, value: Any) -> str:
    return _SHAPES.get(name, "{}").format(value)


if __name__ == "__main__":
    raise SystemExit(main())
