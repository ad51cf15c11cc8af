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
from .rendering import AUTOREGRESSIVE, SELF_SPECULATIVE, pieces

ACCEPTED, VERIFIED = "bold green", "default"


@dataclass(frozen=True)
class Exhibit:
    """A model of a demo: its name and title, how it drafts, a remark, and a file of prompts."""

    model: str
    label: str
    exit_layer: int | str | None
    num_speculations: int | str
    remark: str
    prompts: Path
    draft_head: str | None = None
    exit: str | None = None
    draft_source: str = "exit"


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

    label: str
    remark: str
    decoder: SelfSpeculativeDecoder
    tokenizer: Any
    prompts: list[Prompt]


def load_subjects(args: argparse.Namespace, console: Console) -> list[Subject]:
    """Load the models of the demo."""
    subjects = []
    for exhibit in registry.get(registry.DEMOS, args.name):
        args = argparse.Namespace(**{**vars(args), **vars(exhibit), "dtype": "bfloat16"})
        model, tokenizer = options.load(args, console)
        decoder = SelfSpeculativeDecoder(
            model, exhibit.exit_layer, exhibit.num_speculations, draft_head=options.draft_head(args),
            exit=exhibit.exit, draft_source=exhibit.draft_source,
        )  # fmt: skip
        prompts = arguments.read_prompts(str(exhibit.prompts))
        subjects.append(Subject(exhibit.label, exhibit.remark, decoder, tokenizer, prompts))
    return subjects


def run(args: argparse.Namespace, console: Console) -> int:
    """Decode and print all prompts, and draw the picture; return 1 if any token differs."""
    check_output(args.output, overwrite=True)
    shown: list[SideBySide] = []
    for subject in load_subjects(args, console):
        console.print(Panel(subject.remark, title=_title(subject.decoder)))
        console.print(Text.assemble("drafted and accepted: ", ("green", ACCEPTED), "; given by the full model: plain"))
        for prompt in subject.prompts:
            with console.status("decoding"):
                shown.append(_decode(subject, prompt, args.max_new_tokens))
            _print(console, subject, shown[-1])
    write_atomically(args.output, picture(shown))
    console.print(f"\nThe picture of this is in {args.output.resolve()}", highlight=False, soft_wrap=True)
    if not all(one.identical for one in shown):
        console.print("[bold red]✗ self-speculative decoding changed tokens[/bold red]")
        return 1
    return 0


def _title(decoder: SelfSpeculativeDecoder) -> str:
    layers, trained = decoder.model.num_layers, decoder.model.decoder.num_draft_layers
    exit_ = f"E={decoder.exit_layer} of {layers} layers" + (f" and {trained} trained for it" if trained else "")
    earlier = "text that occurred before"
    drafts = {EXIT: exit_, NGRAM: earlier, AUTO: f"{exit_}, or {earlier},"}[str(decoder.draft_source)]
    return f"{drafts} draft{'s' if drafts == earlier else ''}, {layers} layers verify"


def _decode(subject: Subject, prompt: Prompt, max_new_tokens: int) -> SideBySide:
    decoder = subject.decoder
    input_ids = options.encode(subject.tokenizer, prompt.text, decoder.model.device)
    for strategy in ("autoregressive", "self_speculative"):  # warm-up
        decoder.generate(input_ids, 12, strategy=strategy)
    plain = decoder.generate(input_ids, max_new_tokens, strategy="autoregressive")
    return SideBySide(prompt, subject.label, plain, decoder.generate(input_ids, max_new_tokens))


def _print(console: Console, subject: Subject, shown: SideBySide) -> None:
    width = max(40, (console.width - 1) // 2)
    panels = [
        _panel("autoregressive", subject.tokenizer, shown.plain, width),
        _panel("self-speculative", subject.tokenizer, shown.speculative, width),
    ]
    same = Text("✓ identical tokens", "green") if shown.identical else Text("✗ the tokens differ", "bold red")
    lines = printable(shown.prompt.text).rstrip().splitlines()
    excerpt = "\n".join(["…"] * (len(lines) > 2) + lines[-2:])  # of a long prompt, the end
    heading = Text.assemble((f"{shown.prompt.task}\n", "bold"), (excerpt, "italic"))
    console.print(Group("", heading, Columns(panels, padding=(0, 0)), same))


def _panel(title: str, tokenizer: Any, out: GenerationOutput, width: int) -> Panel:
    stats = out.stats
    caption = f"{stats.decode_tokens_per_second:.1f} tokens/s"
    if stats.drafted:
        caption += f", {stats.accepted}/{stats.drafted} drafts ({stats.acceptance_rate:.0%})"
    return Panel(coloured(tokenizer, out), title=title, subtitle=caption, width=width, title_align="left")


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
        tokens.set(xlabel="new token", title="green: drafted by the early layers and accepted", yticks=[])
        tokens.set_ylim(len(rows) - 0.5, -0.7)
        same = all(row.identical for row in rows)
        tokens.figure.suptitle("identical tokens both ways" if same else "THE TOKENS DIFFER")
        return rendering.saved(tokens)
