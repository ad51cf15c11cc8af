"""Decode a few prompts autoregressively and self-speculatively, side by side; check that the tokens are the same."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from .. import registry
from .._files import check_output, write_atomically
from .._imports import printable
from ..decoding import GenerationOutput, SelfSpeculativeDecoder
from ..decoding.draft_sources import AUTO, EXIT, NGRAM
from . import arguments, options, rendering
from .arguments import Prompt
from .rendering import ACCEPTED, AUTOREGRESSIVE, SELF_SPECULATIVE, pieces

VERIFIED = "default"
REPEATS = 3


@dataclass(frozen=True)
class Exhibit:
    """A model of a demo: its name and title, how it drafts, a remark, and a file of prompts.

    With ``counterexample`` only a line compares the speeds, beside what pays; it does not count in the summary.
    """

    model: str
    label: str
    exit_layer: int | str | None
    num_speculations: int | str | None
    remark: str
    prompts: Path
    draft_head: str | None = None
    exit: str | None = "auto"
    draft_source: str | None = None
    chat: bool = False
    counterexample: bool = False


@dataclass(frozen=True)
class SideBySide:
    """One prompt, decoded both ways by a named model."""

    prompt: Prompt
    model: str
    plain: GenerationOutput
    speculative: GenerationOutput

    @property
    def identical(self) -> bool:
        """Whether both gave the same tokens."""
        return self.plain.sequences.tolist() == self.speculative.sequences.tolist()


class Subject(NamedTuple):
    """A loaded exhibit."""

    exhibit: Exhibit
    decoder: SelfSpeculativeDecoder
    tokenizer: Any
    prompts: list[Prompt]


def load_subjects(args: argparse.Namespace, console: Console) -> list[Subject]:
    """Load the models of the demo, each once."""
    subjects, loaded = [], {}
    for exhibit in registry.get(registry.DEMOS, args.name):
        args = argparse.Namespace(**{**vars(args), **vars(exhibit), "dtype": "bfloat16"})
        if exhibit.model not in loaded:
            loaded[exhibit.model] = options.load(args, console)
        model, tokenizer = loaded[exhibit.model]
        decoder = SelfSpeculativeDecoder(
            model, exhibit.exit_layer, exhibit.num_speculations, draft_head=options.draft_head(args),
            exit=exhibit.exit, draft_source=exhibit.draft_source,
        )  # fmt: skip
        subjects.append(Subject(exhibit, decoder, tokenizer, arguments.read_prompts(str(exhibit.prompts))))
    return subjects


def run(args: argparse.Namespace, console: Console) -> int:
    """Decode and print all prompts, and draw the picture; return 1 if any token differs."""
    check_output(args.output, overwrite=True)
    shown: list[SideBySide] = []
    identical = True
    for subject in load_subjects(args, console):
        exhibit = subject.exhibit
        if not exhibit.counterexample:
            console.print(Panel(exhibit.remark, title=_title(subject.decoder)))
            console.print(Text.assemble("accepted draft tokens: ", ("green", ACCEPTED), "; the full model's: plain"))
        for prompt in subject.prompts:
            with console.status("decoding"):
                one = _decode(subject, prompt, args.max_new_tokens)
            identical = identical and one.identical
            if exhibit.counterexample:
                console.print(f"\n{exhibit.label}: {_speedup([one]):.2f}×. {exhibit.remark}", highlight=False)
            else:
                shown.append(one)
                _print(console, subject, one)
    write_atomically(args.output, picture(shown))
    console.print(f"\nThe picture of this is in {args.output.resolve()}", highlight=False, soft_wrap=True)
    if not identical:
        console.print("[bold red]✗ self-speculative decoding changed tokens[/bold red]")
        return 1
    console.print(f"All {len(shown)} prompts: {_speedup(shown):.2f}× as fast with drafts, and the same tokens.")
    return 0


def _speedup(rows: list[SideBySide]) -> float:
    """Seconds after the first token without drafts, over those with drafts."""
    seconds = [(_decode_seconds(row.plain), _decode_seconds(row.speculative)) for row in rows]
    plain, speculative = (sum(column) for column in zip(*seconds, strict=True))
    return plain / speculative if speculative else 1.0


def _decode_seconds(out: GenerationOutput) -> float:
    return out.stats.seconds - out.stats.time_to_first_token


def _title(decoder: SelfSpeculativeDecoder) -> str:
    layers, trained = decoder.model.num_layers, decoder.model.decoder.num_draft_layers
    exit_ = "early layers" if decoder.exit_layer == "auto" else f"{decoder.exit_layer} of {layers} layers"
    exit_ += f" and {trained} trained for it" if trained else ""
    drafts = {EXIT: exit_, NGRAM: "n-grams", AUTO: f"{exit_}, or n-grams,"}[str(decoder.draft_source)]
    return f"{drafts} draft; {layers} layers verify"


def _decode(subject: Subject, prompt: Prompt, max_new_tokens: int) -> SideBySide:
    """Decode both ways in turn, and keep the run of median speed of each."""
    decoder = subject.decoder
    input_ids = options.encode(subject.tokenizer, prompt.text, decoder.model.device, subject.exhibit.chat)
    ways = ("autoregressive", "self_speculative")
    for strategy in ways:  # warm-up
        decoder.generate(input_ids, 12, strategy=strategy)
    outputs: dict[str, list[GenerationOutput]] = {strategy: [] for strategy in ways}
    for _ in range(REPEATS):
        for strategy in ways:
            outputs[strategy].append(decoder.generate(input_ids, max_new_tokens, strategy=strategy))
    plain, speculative = (sorted(outputs[strategy], key=_decode_seconds)[REPEATS // 2] for strategy in ways)
    return SideBySide(prompt, subject.exhibit.label, plain, speculative)


def _print(console: Console, subject: Subject, shown: SideBySide) -> None:
    width = max(40, (console.width - 1) // 2)
    panels = [
        _panel("autoregressive", subject.tokenizer, shown.plain, width),
        _panel("self-speculative", subject.tokenizer, shown.speculative, width),
    ]
    same = Text("✓ identical tokens", "green") if shown.identical else Text("✗ the tokens differ", "bold red")
    same.append(f", {_speedup([shown]):.2f}× as fast", "default")
    lines = printable(shown.prompt.text).rstrip().splitlines()
    excerpt = "\n".join(["…"] * (len(lines) > 2) + lines[-2:])  # of a long prompt, the end
    heading = Text.assemble((f"{shown.prompt.task}\n", "bold"), (excerpt, "italic"))
    console.print(Group("", heading, Columns(panels, padding=(0, 0)), same))


def _panel(title: str, tokenizer: Any, out: GenerationOutput, width: int) -> Panel:
    stats = out.stats
    text = coloured(tokenizer, out)
    sources = (f"{count.accepted} of {count.drafted} from {name}" for name, count in stats.by_source.items())
    if stats.drafted:
        text.append(f"\naccepted draft tokens: {', '.join(sources)}", "dim")
    subtitle = f"{stats.decode_tokens_per_second:.1f} tokens/s"
    return Panel(text, title=title, subtitle=subtitle, width=width, title_align="left")


def coloured(tokenizer: Any, out: GenerationOutput) -> Text:
    """The new text, with the accepted draft tokens in green."""
    text = Text()
    tokens = out.new_tokens[0].tolist()
    for piece, drafted in zip(pieces(tokenizer, (), tokens), out.drafted[0].tolist(), strict=True):
        text.append(printable(piece), style=ACCEPTED if drafted else VERIFIED)
    return text


def picture(rows: list[SideBySide]) -> bytes:
    """A PNG with one row per prompt: tokens/s on the left; on the right a square per new token, green if drafted."""
    ways = {AUTOREGRESSIVE: [row.plain for row in rows], SELF_SPECULATIVE: [row.speculative for row in rows]}
    rates = {way: [out.stats.decode_tokens_per_second for out in outputs] for way, outputs in ways.items()}
    with rendering.panels(2, size=(11, 1 + 1.1 * len(rows))) as panels:
        speeds, tokens = next(panels), next(panels)
        rendering.speeds(speeds, [f"{row.prompt.task}\n{row.model}" for row in rows], rates)
        for number, out in enumerate(ways[SELF_SPECULATIVE]):
            flags, stats = out.drafted[0].tolist(), out.stats
            colors = ["C2" if flag else "0.75" for flag in flags]
            tokens.bar(range(len(flags)), 0.5, 0.9, bottom=number - 0.25, color=colors)
            caption = f"{stats.accepted} of {stats.drafted} draft tokens accepted ({stats.acceptance_rate:.0%})"
            tokens.text(-0.45, number - 0.3, caption, va="bottom")
        tokens.set(xlabel="new token", title="green: accepted draft tokens", yticks=[])
        tokens.set_ylim(len(rows) - 0.5, -0.7)
        same = all(row.identical for row in rows)
        tokens.figure.suptitle("identical tokens both ways" if same else "THE TOKENS DIFFER")
        return rendering.saved(tokens)
