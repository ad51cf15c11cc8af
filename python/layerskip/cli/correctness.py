"""Check that self-speculative decoding gives the autoregressive tokens, and that those are transformers' in fp32."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..decoding import SelfSpeculativeDecoder
from ..models import LayerSkipModel
from ..models.adapt import dequantized
from . import arguments, options


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Index of the first token that differs (or that one of them lacks); None where there is none."""
    if ours == theirs:
        return None
    shorter = min(len(ours), len(theirs))
    return next((index for index in range(shorter) if ours[index] != theirs[index]), shorter)


def _with_transformers(model: Any, input_ids: Tensor, new_tokens: int) -> list[int]:
    mask = torch.ones_like(input_ids)
    out = model.generate(input_ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return out[0, input_ids.shape[1] :].tolist()


def _compare(decoder: SelfSpeculativeDecoder, input_ids: Tensor, new_tokens: int) -> tuple[int, int | None, float]:
    """Number of tokens, where self-speculative decoding differs, and its acceptance rate."""
    plain = decoder.generate(input_ids, new_tokens, strategy="autoregressive").new_tokens[0].tolist()
    out = decoder.generate(input_ids, new_tokens)
    return len(plain), first_difference(out.new_tokens[0].tolist(), plain), out.stats.acceptance_rate


def _verdict(difference: int | None) -> str:
    return "[green]✓[/green]" if difference is None else f"[red]✗ at new token {difference}[/red]"


def run(args: argparse.Namespace, console: Console) -> int:
    """Compare on every prompt; 1 if any token differs."""
    texts = arguments.read_prompts(args.prompts, args.limit)
    model, tokenizer = options.load(args, console)
    decoder = options.decoder(args, model)
    reference = None
    if not args.skip_transformers:
        reference, _ = options.load(args, console, torch.float32)
        exact = SelfSpeculativeDecoder(reference, decoder.exit_layer, decoder.num_speculations)
        if isinstance(reference, LayerSkipModel):
            reference = dequantized(reference)  # what transformers computes the packed weights' tokens with
    table = Table(
        "prompt",
        title=f"the tokens of {args.model} (E={decoder.exit_layer}, K={decoder.num_speculations}, drafts from "
        f"{decoder.draft_source}) are the same",
    )
    for column in ("tokens", "accepted", f"self-speculative\n({options.weights_of(model)})"):
        table.add_column(column)
    if reference is not None:
        table.add_column("transformers\n(float32)")
    wrong = 0
    progress = Console(stderr=True)
    for prompt in track(texts, "comparing", console=progress, disable=not sys.stderr.isatty()):
        input_ids = options.encode(tokenizer, prompt.text, args.device)
        count, difference, accepted = _compare(decoder, input_ids, args.max_new_tokens)
        verdicts = [difference]
        if reference is not None:
            ours = exact.generate(input_ids, args.max_new_tokens, strategy="autoregressive").new_tokens[0].tolist()
            verdicts.append(first_difference(ours, _with_transformers(reference, input_ids, args.max_new_tokens)))
        wrong += sum(verdict is not None for verdict in verdicts)
        label = escape(" ".join(prompt.text.split())[-28:])
        table.add_row(f"…{label}", str(count), f"{accepted:.0%}", *map(_verdict, verdicts))
    console.print(table)
    console.print(f"[red]{wrong} comparisons failed[/red]" if wrong else "[green]all tokens are identical[/green]")
    return 1 if wrong else 0
