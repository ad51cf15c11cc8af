"""Find the fastest way to draft on some prompts, and write it to a file that `from_pretrained` reads."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from .._files import Journal, check_output
from ..decoding import SelfSpeculativeDecoder
from ..decoding.adaptive import default_exits
from ..decoding.tuning import FILE_NAME, Tuning
from ..models import Exit
from . import arguments, options
from .rendering import table

NUM_SPECULATIONS = (2, 4, 8)
PLAIN = "autoregressive"
_KEPT = 3  # candidates that stay until the last prompt
WORK = ("model", "dtype", "weights", "exit", "prompts", "limit", "chat", "max_new_tokens")
"""The options that the measurements depend on."""


class Measured(NamedTuple):
    """One prompt with one candidate: tokens after the first, their seconds, and a digest of all tokens."""

    tokens: int
    seconds: float
    digest: str


class Ranked(NamedTuple):
    """A candidate with its speedup over decoding without drafts, and its tokens/s."""

    name: str
    speedup: float
    rate: float


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, write; return 1 if a candidate gave other tokens than the full model alone."""
    output = _output(args)
    check_output(output, args.overwrite, (args.prompts, args.exit))
    texts = arguments.read_prompts(args.prompts, args.limit)
    trained = None if args.exit is None else Exit.load(args.exit)
    model, tokenizer = options.load(args, Console(stderr=True))
    tuner = Tuner(model, trained, candidates(model.config.num_hidden_layers, trained, args.exit), args.max_new_tokens)
    encoded = [options.encode(tokenizer, prompt.text, args.device, args.chat) for prompt in texts]
    kept = [ids for ids in encoded if 0 < ids.shape[1] <= tuner.max_seq_len - args.max_new_tokens]
    if not kept:
        raise ValueError(f"none of {len(texts)} prompts fits with {args.max_new_tokens} new tokens")
    journal, work = options.open_journal(args, output, WORK, [prompt.text for prompt in texts])
    ranking = _measure(tuner, kept, journal, console)
    rows = ((one.name, f"{one.rate:.1f}", f"{one.speedup:.2f}×") for one in ranking)
    title = f"{args.model}, {args.prompts}: {len(kept)} prompts"
    console.print(table(title, ("drafts", "tokens/s", "speedup"), rows))
    if tuner.different:
        console.print(f"[red]✗ other tokens than the full model's: {', '.join(tuner.different)}[/red]")
        return 1
    best, tuning = ranking[0], tuner.candidates[ranking[0].name]
    if best.speedup < 1:
        tuning = Tuning("auto", "auto", tuning.draft_head, "auto", tuning.exit)
        console.print(
            f"no candidate is faster than decoding without drafts ({best.name}: {best.speedup:.2f}×), so each round "
            "decides whether to draft"
        )
    measured = {"speedup": round(best.speedup, 3), "tokens_per_second": round(best.rate, 2)}
    tuning.save(output, {**measured, **work, "threads": torch.get_num_threads()})
    journal.remove()
    console.print(f"wrote {output}", highlight=False, soft_wrap=True)
    return 0


def _output(args: argparse.Namespace) -> Path:
    if args.output is not None:
        path: Path = args.output
        return path / FILE_NAME if path.is_dir() else path
    folder = Path(args.model).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{args.model} is no directory, so give --output, the file to write")
    return folder / FILE_NAME


def candidates(num_layers: int, trained: Exit | None, exit_name: str | None) -> list[Tuning]:
    """Every draft source; for exits, also exit layers, numbers of draft tokens and draft heads."""
    heads: tuple[str | None, ...] = ("full", "int8")
    layers: tuple[int, ...] = default_exits(num_layers)
    if trained is not None:
        layers = (trained.exit_layer,)
        heads = (None, "int8") if trained.token_ids is None else (None,)
    exits = [
        Tuning(layer, count, head, "exit", exit_name)
        for layer in layers
        for count in NUM_SPECULATIONS
        for head in heads
    ]
    either = [Tuning("auto", "auto", head, "auto", exit_name) for head in heads]
    return [*exits, Tuning("auto", "auto", heads[0], "ngram"), *either]


def name_of(tuning: Tuning) -> str:
    """A readable name of a candidate."""
    if tuning.draft_source == "ngram":
        return "n-grams"
    layer = f"E={tuning.exit_layer}, K={tuning.num_speculations}"
    source = f"exit {layer}" if tuning.draft_source == "exit" else "exit or n-grams, picked round by round"
    return f"{source}, {tuning.draft_head or 'own'} head"


class Tuner:
    """Candidates for a model, and their measurements on each prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    trained : Exit or None
    tunings : sequence of Tuning
    max_new_tokens : int

    Attributes
    ----------
    candidates : dict of str to Tuning
    different : list of str
        The candidates whose tokens are not those of the full model.
    """

    def __init__(self, model: Any, trained: Exit | None, tunings: Sequence[Tuning], max_new_tokens: int) -> None:
        self.candidates = {name_of(tuning): tuning for tuning in tunings}
        self._decoders = {
            head: SelfSpeculativeDecoder(model, num_speculations="auto", draft_head=head, exit=trained)
            for head in dict.fromkeys(tuning.draft_head for tuning in tunings)
        }
        self._new_tokens = max_new_tokens
        self.max_seq_len = next(iter(self._decoders.values())).max_seq_len
        self.different: list[str] = []
        self.known: dict[tuple[int, str], Measured] = {}

    def plan(self, num_prompts: int) -> list[tuple[range, int]]:
        """Prompts and number of candidates of each stage: twice the prompts and half the candidates each time."""
        plan, first, size, count = [], 0, 1, len(self.candidates)
        while first < num_prompts:
            last = min(first + size, num_prompts)
            plan.append((range(first, last), count))
            first, size, count = last, 2 * size, min(count, max(_KEPT, -(-count // 2)))
        return plan

    def measure(self, name: str, ids: Tensor) -> Measured:
        """Decode a prompt [1, N] with a candidate, or without drafts."""
        tuning = self.candidates.get(name, Tuning(draft_head=next(iter(self._decoders))))
        given: Mapping[str, Any] = {"strategy": PLAIN}
        if name != PLAIN:
            keys = ("exit_layer", "num_speculations", "draft_source")
            given = {key: getattr(tuning, key) for key in keys}
        out = self._decoders[tuning.draft_head].generate(ids, self._new_tokens, **given)
        digest = hashlib.sha256(str(out.new_tokens.tolist()).encode()).hexdigest()[:16]
        stats = out.stats
        return Measured(stats.new_tokens - 1, stats.seconds - stats.time_to_first_token, digest)

    def warm_up(self, ids: Tensor) -> None:
        """Decode a few tokens each way, so that caches are allocated and pages mapped."""
        for decoder in self._decoders.values():
            room = min(16, decoder.max_seq_len - ids.shape[1])
            for strategy in (PLAIN, "self_speculative"):
                decoder.generate(ids, room, strategy=strategy)

    def add(self, prompt: int, name: str, measured: Measured) -> None:
        """Record a measurement, and whether its tokens differ."""
        self.known[prompt, name] = measured
        if measured.digest != self.known[prompt, PLAIN].digest and name not in self.different:
            self.different.append(name)

    def rate(self, name: str) -> float:
        """Tokens/s over the prompts of a candidate; 0 if all ended at their first token."""
        return _rate([one for (_, other), one in self.known.items() if other == name])

    def speedup(self, name: str) -> float:
        """Speedup over decoding the same prompts without drafts."""
        pairs = [(self.known[prompt, PLAIN], one) for (prompt, other), one in self.known.items() if other == name]
        plain = _rate([before for before, _ in pairs])
        return _rate([one for _, one in pairs]) / plain if plain else 1.0

    def best(self, count: int) -> list[str]:
        """The ``count`` fastest of the candidates that were measured with the most prompts, fastest first."""
        seen = {name: sum(other == name for _, other in self.known) for name in self.candidates}

        def key(name: str) -> tuple[int, float]:
            return seen[name], self.speedup(name) if seen[name] else 0

        return sorted(self.candidates, key=key, reverse=True)[:count]


def _rate(measured: Sequence[Measured]) -> float:
    seconds = sum(one.seconds for one in measured)
    return sum(one.tokens for one in measured) / seconds if seconds > 0 else 0.0


def _measure(tuner: Tuner, encoded: Sequence[Tensor], journal: Journal, console: Console) -> list[Ranked]:
    """Measure all stages; the candidates of the last one, fastest first."""
    before = {(record["prompt"], record["way"]): record["measured"] for record in journal.records}
    plan, left = tuner.plan(len(encoded)), list(tuner.candidates)
    total = sum(len(part) * (count + 1) for part, count in plan)
    with options.journaled(journal, "measurements", total, console) as append:
        tuner.warm_up(encoded[0])
        for part, count in plan:
            left = left if len(left) == count else tuner.best(count)
            for prompt in part:
                for name in (PLAIN, *left):
                    if (prompt, name) in before:
                        measured = Measured(*before[prompt, name])
                    else:
                        measured = tuner.measure(name, encoded[prompt])
                        append({"prompt": prompt, "way": name, "measured": list(measured)})
                    tuner.add(prompt, name, measured)
    return [Ranked(name, tuner.speedup(name), tuner.rate(name)) for name in tuner.best(len(left))]
