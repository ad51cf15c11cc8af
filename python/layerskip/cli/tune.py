"""Measure how drafting is fastest on some prompts, and keep it in a file that `from_pretrained` reads."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from .._files import Journal, check_output
from ..decoding import SelfSpeculativeDecoder
from ..decoding.adaptive import default_exits
from ..decoding.tuning import FILE_NAME, Tuning
from ..models import Exit
from . import arguments, options

DRAFTS = (2, 4, 8)
PLAIN = "autoregressive"
_KEPT = 3  # so many ways stay until the last prompt


class Measured(NamedTuple):
    """One prompt, one way: tokens after the first, their seconds, and a digest of all tokens."""

    tokens: int
    seconds: float
    digest: str


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, show, write; 1 if a way gave other tokens than the full model alone."""
    output = _output(args)
    check_output(output, args.overwrite)
    texts = arguments.read_prompts(args.prompts, args.limit)
    trained = None if args.exit is None else Exit.load(args.exit)
    model, tokenizer = options.load(args, Console(stderr=True))
    ways = candidates(model.config.num_hidden_layers, trained, args.exit)
    tuner = Tuner(model, trained, ways, args.max_new_tokens)
    encoded = [options.encode(tokenizer, prompt.text, args.device, args.chat) for prompt in texts]
    kept = [ids for ids in encoded if 0 < ids.shape[1] <= tuner.max_seq_len - args.max_new_tokens]
    if not kept:
        raise ValueError(f"none of {len(texts)} prompts fits with {args.max_new_tokens} new tokens")
    work = _work(args, [prompt.text for prompt in texts])
    journal = Journal(output.with_name(f"{output.name}.partial"), work, args.overwrite)
    ranking = _measure(tuner, kept, journal, console)
    console.print(table(ranking, f"{args.model}, {args.prompts}: {len(kept)} prompts"))
    if tuner.different:
        console.print(f"[red]✗ other tokens than the full model's: {', '.join(tuner.different)}[/red]")
        return 1
    _write(output, ranking, journal, {**work, "threads": torch.get_num_threads()}, console)
    return 0


def _output(args: argparse.Namespace) -> Path:
    if args.output is not None:
        path: Path = args.output
        return path / FILE_NAME if path.is_dir() else path
    folder = Path(args.model).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{args.model} is no directory, so give --output, the file to write")
    return folder / FILE_NAME


def _work(args: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """What the measurements depend on."""
    keys = ("model", "dtype", "weights", "exit", "prompts", "limit", "chat", "max_new_tokens")
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {**{key: getattr(args, key) for key in keys}, "device": args.device.type, "digest of the prompts": digest}


def candidates(num_layers: int, trained: Exit | None, exit_name: str | None) -> list[Tuning]:
    """What is tried: every source, and of exits the layers, the numbers of drafts and the heads."""
    heads: tuple[str | None, ...] = ("full", "int8")
    layers: tuple[int, ...] = default_exits(num_layers)
    if trained is not None:
        layers = (trained.exit_layer,)
        heads = (None, "int8") if trained.token_ids is None else (None,)
    exits = [Tuning(layer, count, head, "exit", exit_name) for layer in layers for count in DRAFTS for head in heads]
    either = [Tuning("auto", "auto", head, "auto", exit_name) for head in heads]
    return [*exits, Tuning("auto", "auto", heads[0], "ngram"), *either]


def named(tuning: Tuning) -> str:
    """A way in words."""
    if tuning.draft_source == "ngram":
        return "n-grams"
    layer = f"E={tuning.exit_layer}, K={tuning.num_speculations}"
    what = f"exit {layer}" if tuning.draft_source == "exit" else "exit or n-grams, picked round by round"
    return f"{what}, {tuning.draft_head or 'own'} head"


class Tuner:
    """The ways to draft for a model, and what each took for each prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    trained : Exit or None
    ways : sequence of Tuning
    max_new_tokens : int

    Attributes
    ----------
    different : list of str
        The ways whose tokens are not those of the full model.
    """

    def __init__(self, model: Any, trained: Exit | None, ways: Sequence[Tuning], max_new_tokens: int) -> None:
        self.ways = {named(way): way for way in ways}
        self._decoders = {
            head: SelfSpeculativeDecoder(model, num_speculations="auto", draft_head=head, exit=trained)
            for head in dict.fromkeys(way.draft_head for way in ways)
        }
        self._new_tokens = max_new_tokens
        self.max_seq_len = next(iter(self._decoders.values())).max_seq_len
        self.different: list[str] = []
        self.known: dict[tuple[int, str], Measured] = {}

    def rounds(self, num_prompts: int) -> list[tuple[range, int]]:
        """Which prompts are measured, and how many ways take part: half of them each time, with twice the prompts."""
        plan, first, size, ways = [], 0, 1, len(self.ways)
        while first < num_prompts:
            last = min(first + size, num_prompts)
            plan.append((range(first, last), ways))
            first, size, ways = last, 2 * size, min(ways, max(_KEPT, -(-ways // 2)))
        return plan

    def measure(self, name: str, ids: Tensor) -> Measured:
        """Decode a prompt [1, N]."""
        way = self.ways.get(name, Tuning(draft_head=next(iter(self._decoders))))
        given = {"strategy": PLAIN} if name == PLAIN else {
            "exit_layer": way.exit_layer, "num_speculations": way.num_speculations, "draft_source": way.draft_source,
        }  # fmt: skip
        out = self._decoders[way.draft_head].generate(ids, self._new_tokens, **given)
        digest = hashlib.sha256(str(out.new_tokens.tolist()).encode()).hexdigest()[:16]
        stats = out.stats
        return Measured(stats.new_tokens - 1, stats.seconds - stats.time_to_first_token, digest)

    def warm_up(self, ids: Tensor) -> None:
        """Decode a few tokens each way, so that caches and pages are there."""
        for decoder in self._decoders.values():
            room = min(16, decoder.max_seq_len - ids.shape[1])
            for strategy in (PLAIN, "self_speculative"):
                decoder.generate(ids, room, strategy=strategy)

    def note(self, prompt: int, name: str, measured: Measured) -> None:
        """Take account of a measurement."""
        self.known[prompt, name] = measured
        if measured.digest != self.known[prompt, PLAIN].digest and name not in self.different:
            self.different.append(name)

    def rate(self, name: str) -> float:
        """Tokens a second over the prompts that a way was measured with; 0 where all ended at their first token."""
        return _rate([one for (_, other), one in self.known.items() if other == name])

    def speedup(self, name: str) -> float:
        """Over decoding the same prompts with the full model alone."""
        pairs = [(self.known[prompt, PLAIN], one) for (prompt, other), one in self.known.items() if other == name]
        plain = _rate([before for before, _ in pairs])
        return _rate([one for _, one in pairs]) / plain if plain else 1.0

    def best(self, count: int) -> list[str]:
        """So many of the ways, the fastest first, of those that were measured with the most prompts."""
        seen = {name: sum(other == name for _, other in self.known) for name in self.ways}
        order = sorted(self.ways, key=lambda name: (seen[name], self.speedup(name) if seen[name] else 0), reverse=True)
        return order[:count]


def _rate(measured: Sequence[Measured]) -> float:
    seconds = sum(one.seconds for one in measured)
    return sum(one.tokens for one in measured) / seconds if seconds > 0 else 0.0


def _measure(
    tuner: Tuner, encoded: Sequence[Tensor], journal: Journal, console: Console
) -> list[tuple[str, Tuning, float, float]]:
    """Each way that stayed to the end, its speedup and tokens a second, the fastest first."""
    before = {(record["prompt"], record["way"]): record["measured"] for record in journal.records}
    if before:
        console.print(f"{len(before)} measurements are in {journal.path}, the others follow", soft_wrap=True)
    plan, left = tuner.rounds(len(encoded)), list(tuner.ways)
    total = sum(len(part) * (count + 1) for part, count in plan)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            shown = progress.add_task("measuring", total=total)
            tuner.warm_up(encoded[0])
            for part, count in plan:
                left = left if len(left) == count else tuner.best(count)
                for prompt in part:
                    for name in (PLAIN, *left):
                        if (prompt, name) in before:
                            measured = Measured(*before[prompt, name])
                        else:
                            measured = tuner.measure(name, encoded[prompt])
                            journal.append({"prompt": prompt, "way": name, "measured": list(measured)})
                        tuner.note(prompt, name, measured)
                        progress.advance(shown)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {len(journal.records)} measurements are in {journal.path}, the same command goes on there"
        ) from None
    finally:
        journal.close()
    return [(name, tuner.ways[name], tuner.speedup(name), tuner.rate(name)) for name in tuner.best(len(left))]


def table(ranking: Sequence[tuple[str, Tuning, float, float]], title: str) -> Table:
    """A line for each way that stayed to the end."""
    shown = Table("drafts", "tokens/s", "speedup", title=title, title_justify="left")
    for name, _, speedup, rate in ranking:
        shown.add_row(name, f"{rate:.1f}", f"{speedup:.2f}×")
    return shown


def _write(
    output: Path, ranking: Sequence[tuple[str, Tuning, float, float]], journal: Journal, work: Mapping[str, Any],
    console: Console,
) -> None:  # fmt: skip
    """Write the fastest way."""
    name, best, speedup, rate = ranking[0]
    if speedup < 1:
        best = Tuning("auto", "auto", best.draft_head, "auto", best.exit)
        console.print(f"no way is faster than none ({name}: {speedup:.2f}×), so each round picks whether to draft")
    best.save(output, {"speedup": round(speedup, 3), "tokens_per_second": round(rate, 2), **work})
    journal.remove()
    console.print(f"wrote {output}", highlight=False, soft_wrap=True)
