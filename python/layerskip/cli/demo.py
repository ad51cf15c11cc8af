"""Decode a few prompts autoregressively and self-speculatively, side by side; check that the tokens are the same."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from .. import registry
from .._files import check_output, write_atomically
from ..decoding import DraftHead, GenerationOutput, SelfSpeculativeDecoder
from ..decoding.draft_sources import AUTO, EXIT, NGRAM
from . import arguments, options, plots
from .arguments import Prompt
from .ways import AUTOREGRESSIVE, SELF_SPECULATIVE

ACCEPTED, VERIFIED = "bold green", "default"


@dataclass(frozen=True)
class Exhibit:
    """A model of a demo, by name: what it is shown as, how it drafts, what to know about it, and a file of prompts."""

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
class Subject:
    """An exhibit that has been loaded."""

    name: str
    model: Any
    tokenizer: Any
    exit_layer: int | str | None
    num_speculations: int | str
    remark: str
    prompts: list[Prompt]
    draft_head: str | DraftHead | None = None
    exit: str | None = None
    draft_source: str = "exit"


@dataclass(frozen=True)
class SideBySide:
    """One prompt, decoded autoregressively and self-speculatively by the model of some name."""

    prompt: Prompt
    model: str
    plain: GenerationOutput
    speculative: GenerationOutput

    @property
    def identical(self) -> bool:
        """Whether both gave the same tokens."""
        return self.plain.sequences.tolist() == self.speculative.sequences.tolist()


def load_subjects(args: argparse.Namespace, console: Console) -> list[Subject]:
    """The models of the demo that the options name."""
    args.dtype = "bfloat16"
    subjects = []
    for exhibit in registry.get(registry.DEMOS, args.name):
        args.model, args.draft_head = exhibit.model, exhibit.draft_head
        subjects.append(
            Subject(
                exhibit.label,
                *options.load(args, console),
                exhibit.exit_layer,
                exhibit.num_speculations,
                exhibit.remark,
                arguments.read_prompts(str(exhibit.prompts)),
                options.draft_head(args),
                exhibit.exit,
                exhibit.draft_source,
            )
        )
    return subjects


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text that each token adds; a character made of several tokens belongs to the last of them."""
    texts, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        whole = not text.endswith("\ufffd")
        texts.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return texts


def coloured(tokenizer: Any, out: GenerationOutput) -> Text:
    """The new text, with the tokens that the early layers drafted in green."""
    text = Text()
    for piece, drafted in zip(pieces(tokenizer, out.new_tokens[0].tolist()), out.drafted[0].tolist(), strict=True):
        text.append(piece, style=ACCEPTED if drafted else VERIFIED)
    return text


def _panel(title: str, tokenizer: Any, out: GenerationOutput, width: int) -> Panel:
    stats = out.stats
    caption = f"{stats.decode_tokens_per_second:.1f} tokens/s"
    if stats.drafted:
        caption += f", {stats.accepted}/{stats.drafted} drafts ({stats.acceptance_rate:.0%})"
    return Panel(coloured(tokenizer, out), title=title, subtitle=caption, width=width, title_align="left")


def _show(console: Console, subject: Subject, shown: SideBySide) -> None:
    width = max(40, (console.width - 1) // 2)
    panels = [
        _panel("autoregressive", subject.tokenizer, shown.plain, width),
        _panel("self-speculative", subject.tokenizer, shown.speculative, width),
    ]
    same = Text("✓ identical tokens", "green") if shown.identical else Text("✗ the tokens differ", "bold red")
    lines = shown.prompt.text.rstrip().splitlines()
    excerpt = "\n".join(["…"] * (len(lines) > 2) + lines[-2:])  # of a long prompt, the end
    heading = Text.assemble((f"{shown.prompt.task}\n", "bold"), (excerpt, "italic"))
    console.print(Group("", heading, Columns(panels, padding=(0, 0)), same))


def run(args: argparse.Namespace, console: Console) -> int:
    """Show; 1 if any token differs."""
    check_output(args.output, overwrite=True)
    shown: list[SideBySide] = []
    for subject in load_subjects(args, console):
        shown += _decode(args, console, subject)
    return _finish(args, console, shown)


def _decode(args: argparse.Namespace, console: Console, subject: Subject) -> list[SideBySide]:
    decoder = SelfSpeculativeDecoder(
        subject.model, subject.exit_layer, subject.num_speculations, draft_head=subject.draft_head,
        exit=subject.exit, draft_source=subject.draft_source,
    )  # fmt: skip
    console.print(Panel(subject.remark, title=_title(decoder)))
    console.print(Text.assemble("drafted and accepted: ", ("green", ACCEPTED), "; given by the full model: plain"))
    shown = []
    for prompt in subject.prompts:
        input_ids = options.encode(subject.tokenizer, prompt.text, decoder.model.device)
        with console.status("decoding"):
            for strategy in ("autoregressive", "self_speculative"):  # a warm-up
                decoder.generate(input_ids, 12, strategy=strategy)
            plain = decoder.generate(input_ids, args.max_new_tokens, strategy="autoregressive")
            speculative = decoder.generate(input_ids, args.max_new_tokens)
        shown.append(SideBySide(prompt, subject.name, plain, speculative))
        _show(console, subject, shown[-1])
    return shown


def _title(decoder: SelfSpeculativeDecoder) -> str:
    """What drafts and what verifies, in words."""
    layers, draft_layers = decoder.model.num_layers, decoder.model.decoder.num_draft_layers
    exit_ = f"E={decoder.exit_layer} of {layers} layers" + (
        f" and {draft_layers} trained for it" if draft_layers else ""
    )
    earlier = "text that occurred before"
    drafts = {EXIT: exit_, NGRAM: earlier, AUTO: f"{exit_}, or {earlier},"}[str(decoder.draft_source)]
    return f"{drafts} draft{'s' if drafts == earlier else ''}, {layers} layers verify"


def _finish(args: argparse.Namespace, console: Console, shown: list[SideBySide]) -> int:
    write_atomically(args.output, picture(shown))
    console.print(f"\nThe picture of this is in {args.output.resolve()}", highlight=False, soft_wrap=True)
    if not all(one.identical for one in shown):
        console.print("[bold red]✗ self-speculative decoding changed tokens[/bold red]")
        return 1
    return 0


def picture(rows: list[SideBySide]) -> bytes:
    """A PNG with one row per prompt: tokens/s on the left; on the right a square per new token, green if drafted."""
    ways = {AUTOREGRESSIVE: [row.plain for row in rows], SELF_SPECULATIVE: [row.speculative for row in rows]}
    rates = {way: [out.stats.decode_tokens_per_second for out in outputs] for way, outputs in ways.items()}
    with plots.panels(2, size=(11, 1 + 1.1 * len(rows))) as panels:
        speeds, tokens = next(panels), next(panels)
        plots.speeds(speeds, [f"{row.prompt.task}\n{row.model}" for row in rows], rates)
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
        return plots.saved(tokens)
