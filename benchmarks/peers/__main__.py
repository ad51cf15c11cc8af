"""Decoding speed beside what people would otherwise take, in one run on the same weights.

    python -m benchmarks.peers --install llama.cpp openvino     # an environment each, once
    make .venv-vllm/.built                                      # vLLM's
    python -m benchmarks.peers [--tasks parsing] [--engines layerskip llama.cpp] [--limit 6]

Every way of decoding has a process with its model, up to 1.7 GB each, 34 of them. They take turns, prompt by prompt, in
a shuffled order, so that whatever else the machine does disturbs all alike. Speeds are those after the first tokens;
the ratio is the median over the prompts of that to our autoregressive bf16 decoding of the same prompt. The time to the
first token is measured with the first task's models; the others have the same shape. Our E and K are those that serve a
task best; the peers draft with the same first layers, or look up 8 tokens; llama.cpp is driven token by token from
Python. Ours, self-speculative, must give the tokens of ours, autoregressive, in the same weights; the others' greedy
texts may differ, since they round differently. What cannot be measured is listed with its reason. A finished task is
kept in OUTPUT.partial: after an interrupt the same command continues.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from layerskip import _ends
from layerskip._files import Journal, write_atomically
from layerskip.cli.arguments import read_prompts

from ..harness import MissingPeerError, machine
from .methods import OURS, REQUIREMENTS, TASKS, Forms, Method, Worker, install, methods
from .report import Measured, markdown, page, picture

SETTINGS = ("tasks", "engines", "limit", "max_new_tokens", "first_token", "repeat", "threads", "models", "gguf")
"""Of the arguments, those that figures depend on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Install, or measure; write JSON, a page and its picture, and print tables."""
    args = _parsed(arguments)
    for engine in args.install:
        install(engine)
    if args.install:
        return
    report = json.loads(args.measured.read_text(encoding="utf-8")) if args.measured else _report(args)
    write_atomically(args.output.with_suffix(".png"), picture(report["tasks"]))
    write_atomically(args.output.with_suffix(".md"), page(report, args.output.name).encode())


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """All tasks, written at the end; until then each is kept in a journal, and KeyboardInterrupt says where."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings = {name: settings[name] for name in SETTINGS}
    here = machine()
    print(f"{here['cpu']}, {args.threads} threads; {args.limit} prompts, {args.max_new_tokens} new tokens")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.output.with_suffix(".partial"), {"machine": here, **settings}, args.overwrite)
    try:
        for name in args.tasks[len(journal.records) :]:
            journal.append(_measure(args, name))
            print(markdown(name, journal.records[-1]["rows"], journal.records[-1]["skipped"]), flush=True)
    except KeyboardInterrupt:
        done = f"{len(journal.records)} of {len(args.tasks)} tasks are in {journal.path}"
        kept = f"; {done}, the same command goes on there" if journal.records else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    finally:
        journal.close()
    report = {"machine": here, "settings": settings, "tasks": dict(zip(args.tasks, journal.records, strict=True))}
    write_atomically(args.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
    journal.remove()
    return report


def _measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    task = TASKS[name]
    args.models.mkdir(parents=True, exist_ok=True)
    forms = Forms(task.model, args.models, args.gguf or _stock_gguf())
    prompts = [forms.tokenizer(prompt.text).input_ids for prompt in read_prompts(task.prompts, args.limit)]
    length = max([*args.first_token, *map(len, prompts)]) + args.max_new_tokens + 64
    found = list(methods(task, args.engines, forms, args.threads, length))
    del forms
    with ExitStack() as stack:
        run = Run()
        for way in track(found, f"{name}: loading"):
            run.load(way, stack, prompts, args.max_new_tokens)
        for number, ids in enumerate(track(prompts, f"{name}: {len(run.measured)} ways")):
            for one in run.shuffled(number):
                run.ask(one, ids, args.max_new_tokens, one.take)
        if name == args.tasks[0]:
            _first_tokens(run, prompts, args)
    check(run.measured)
    rows = [one.row(run.measured[0]) for one in run.measured]
    return {"rows": rows, "skipped": run.skipped, "samples": [one.samples() for one in run.measured]}


class Run:
    """The ways that can be measured so far, the baseline first, and why others cannot."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []
        self.skipped: dict[str, str] = {}

    def load(self, way: Method, stack: ExitStack, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """Start the worker process; decode the shortest and the longest prompt to warm up caches and compilation."""
        try:
            worker = Worker(way.engine, way.settings)
        except MissingPeerError as error:
            self._skip(way, error)
            return
        stack.callback(worker.close)
        one = Measured(way, worker)
        self.measured.append(one)
        for ids in (min(prompts, key=len), max(prompts, key=len)):
            self.ask(one, ids, new_tokens, lambda answer: None)

    def ask(self, one: Measured, ids: list[int], new_tokens: int, take: Callable[[dict[str, Any]], None]) -> None:
        """Let a way decode a prompt; one whose process ends is measured no more."""
        if str(one.way) in self.skipped:
            return
        try:
            take(one.worker.decode(ids, new_tokens))
        except MissingPeerError as error:
            self._skip(one.way, error)
            self.measured.remove(one)

    def shuffled(self, seed: int) -> list[Measured]:
        """All ways, in an order in which none always follows the same other."""
        return random.Random(seed).sample(self.measured, len(self.measured))

    def _skip(self, way: Method, error: MissingPeerError) -> None:
        if way.is_baseline:
            raise RuntimeError(f"{way}, which all are compared with, could not be measured: {error}") from error
        self.skipped[str(way)] = str(error)


def _stock_gguf() -> Path:
    from layerskip_smollm2.weights import gguf_file

    return gguf_file()


def _first_tokens(run: Run, prompts: Sequence[list[int]], args: argparse.Namespace) -> None:
    """Seconds to the first token of prompts of some lengths, which all begin differently: engines may keep prompts."""
    text = [token for ids in prompts for token in ids]
    for place, length in enumerate(args.first_token):
        for repeat in range(args.repeat + 1):  # the first of a length sets up what depends on it
            shift = (place * (args.repeat + 1) + repeat + 1) % len(text)
            ids = ((text[shift:] + text[:shift]) * (length // len(text) + 1))[:length]
            for one in run.shuffled(repeat):
                if one.way.plain:
                    run.ask(one, ids, 2, partial(one.take_first, length) if repeat else lambda answer: None)


def check(measured: Sequence[Measured]) -> None:
    """Our tokens must not depend on how they are drafted."""
    plain = {one.way.weights: one.texts for one in measured if one.way.engine == OURS and one.way.plain}
    for one in measured:
        if one.way.engine == OURS and one.texts != plain.get(one.way.weights, one.texts):
            raise RuntimeError(f"{one.way}: its tokens are not those of autoregressive decoding")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = [OURS, "transformers", *REQUIREMENTS, "vllm"]
    parser.add_argument("--install", nargs="+", choices=REQUIREMENTS, default=[], help="make their environments")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--limit", type=int, default=4, help="prompts of each task")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--first-token", type=int, nargs="*", default=[16, 512, 4096], help="lengths of prompts")
    parser.add_argument("--repeat", type=int, default=2, help="of each such prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", type=Path, default=Path(".cache/peers"), help="where the weights are written")
    parser.add_argument("--gguf", type=Path, help="whose tokenizer and settings GGUF files get (default: SmolLM2's)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/peers"), help="without .json, .md, .png"
    )
    parser.add_argument("--measured", type=Path, help="measure nothing: take this file's figures")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where a stopped run had other settings")
    _ends.declare(parser)
    args = parser.parse_args(arguments)
    if args.limit < 1 or args.max_new_tokens < 2:
        parser.error("--limit must be at least 1, and --max-new-tokens 2: speed is measured after the first token")
    if OURS not in args.engines:
        parser.error(f"--engines must have {OURS}, which the others are compared with")
    return args


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks.peers", main))
