"""Decoding speed beside what people would otherwise take, in one run on the same weights.

    python -m benchmarks.peers --install llama.cpp openvino     # an environment each, once
    python -m benchmarks.peers [--tasks parsing] [--engines layerskip llama.cpp] [--limit 6]

Every way of decoding has a process with its model, and they take turns, prompt by prompt, in an order that rotates, so
that whatever else the machine does disturbs all alike. Speeds are those after the first tokens; the ratio is the median
over the prompts of that to our autoregressive bf16 decoding of the same prompt. Ours, self-speculative, must give the
tokens of ours, autoregressive, in the same weights; the others' greedy texts may differ, since they round differently.
What cannot be measured is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from layerskip import _ends
from layerskip._files import write_atomically
from layerskip.cli.prompts import read
from layerskip.models import load

from ..harness import machine
from .models import directory, gguf_file
from .processes import REQUIREMENTS, MissingPeerError, Worker, install
from .report import Measured, markdown, picture
from .ways import OURS, TASKS, Task, Way, ways


def main(arguments: Sequence[str] | None = None) -> None:
    """Install, or measure and write JSON, Markdown and a picture after each task."""
    args = _parsed(arguments)
    for engine in args.install:
        install(engine)
    if args.install:
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "tasks": {}}
    for name in args.tasks:
        measured, skipped = _measure(args, TASKS[name], name)
        rows = [one.row(measured[0]) for one in measured]
        report["tasks"][name] = {"rows": rows, "skipped": skipped, "samples": [one.samples() for one in measured]}
        print(markdown(name, rows, skipped), flush=True)
        write_atomically(args.output.with_suffix(".json"), json.dumps(report, indent=1).encode())
        write_atomically(args.output.with_suffix(".png"), picture(report["tasks"]))


def _measure(args: argparse.Namespace, task: Task, name: str) -> tuple[list[Measured], dict[str, str]]:
    _, tokenizer = load(task.model)
    prompts = [tokenizer(prompt.text).input_ids for prompt in read(task.prompts, args.limit)]
    length = max(args.first_token, default=0) + args.max_new_tokens + 64
    prompts = [ids for ids in prompts if len(ids) + args.max_new_tokens <= length]
    measured: list[Measured] = []
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        for way in _wanted(args, task, length):
            try:
                worker = Worker(way.engine, way.settings)
                stack.callback(worker.close)
                worker.decode(prompts[0], 4)  # pages, caches and compilation
            except MissingPeerError as error:
                skipped[str(way)] = str(error)
            else:
                measured.append(Measured(way, worker))
        if not measured or str(measured[0].way.engine) != OURS:
            raise SystemExit(f"our own decoding could not be measured: {skipped}")
        _take_turns(measured, prompts, args.max_new_tokens, f"{name}, {len(measured)} ways")
        _first_tokens([one for one in measured if one.way.plain], prompts[0], args)
    _check(measured)
    return measured, skipped


def _wanted(args: argparse.Namespace, task: Task, length: int) -> Iterable[Way]:
    folder = args.models
    folder.mkdir(parents=True, exist_ok=True)
    like = args.gguf or _stock_gguf()
    made = ways(task, directory(task.model, folder), lambda kind: gguf_file(task.model, kind, like, folder),
                args.threads, length)  # fmt: skip
    return (way for way in made if way.engine in args.engines)


def _stock_gguf() -> Path:
    from layerskip_smollm2.weights import gguf_file as stock

    return stock()


def _take_turns(measured: Sequence[Measured], prompts: Sequence[list[int]], new_tokens: int, label: str) -> None:
    for number, ids in enumerate(track(prompts, label)):
        first = number % len(measured)
        for one in (*measured[first:], *measured[:first]):
            one.take(one.worker.decode(ids, new_tokens))


def _first_tokens(measured: Sequence[Measured], prompt: list[int], args: argparse.Namespace) -> None:
    """Seconds to the first token of prompts of some lengths, which are one prompt again and again."""
    for length in args.first_token:
        ids = (prompt * (length // len(prompt) + 1))[:length]
        for _ in range(args.repeat):
            for one in measured:
                one.take_first(length, one.worker.decode(ids, 2)["first"])


def _check(measured: Sequence[Measured]) -> None:
    """Our tokens must not depend on how they are drafted."""
    plain = {one.way.weights: one for one in measured if one.way.engine == OURS and one.way.plain}
    for one in measured:
        if one.way.engine == OURS and one.texts != plain[one.way.weights].texts:
            raise RuntimeError(f"{one.way}: its tokens are not those of autoregressive decoding")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = [OURS, "transformers", *REQUIREMENTS]
    parser.add_argument("--install", nargs="+", choices=REQUIREMENTS, default=[], help="make their environments")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--limit", type=int, default=6, help="prompts of each task")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--first-token", type=int, nargs="*", default=[16, 512, 4096], help="lengths of prompts")
    parser.add_argument("--repeat", type=int, default=3, help="of each such prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", type=Path, default=Path(".cache/peers"), help="where the weights are written")
    parser.add_argument("--gguf", type=Path, help="whose tokenizer and settings GGUF files get (default: SmolLM2's)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers"))
    _ends.declare(parser)
    args = parser.parse_args(arguments)
    if OURS not in args.engines:
        parser.error(f"--engines must have {OURS}, which the others are compared with")
    return args


if __name__ == "__main__":
    sys.exit(_ends.module("benchmarks.peers", main))
