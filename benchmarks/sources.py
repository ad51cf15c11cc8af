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
import time
from collections.abc import Sequence
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

from .harness import machine
from .source_tables import COLUMNS, PLAIN, markdown, page
from .source_tasks import TASKS, prompts


@dataclass
class Way:
    """One way of decoding, and what it gave."""

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


if __name__ == "__main__":
    raise SystemExit(main())
