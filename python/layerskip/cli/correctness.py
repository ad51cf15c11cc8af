"""Check that self-speculative decoding gives the autoregressive tokens, and that those are transformers' in fp32."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from .._imports import printable
from ..decoding import SelfSpeculativeDecoder
from ..models import LayerSkipModel
from ..models.adaptation import dequantized
from . import arguments, options
from .rendering import table


def run(args: argparse.Namespace, console: Console) -> int:
    """Compare the tokens of every prompt; return 1 if any token differs."""
    texts = arguments.read_prompts(args.prompts, args.limit)
    model, tokenizer = options.load(args, console)
    decoder = options.decoder(args, model)
    reference = None
    if not args.skip_transformers:
        reference, _ = options.load(args, console, torch.float32)
        exact = SelfSpeculativeDecoder(reference, decoder.exit_layer, decoder.num_speculations)
        if isinstance(reference, LayerSkipModel):
            reference = dequantized(reference)  # transformers has no packed weights
    rows, wrong = [], 0
    with options.progress() as progress:
        for prompt in progress.track(texts, description="comparing"):
            input_ids = options.encode(tokenizer, prompt.text, args.device)
            plain = _generate(decoder, input_ids, args.max_new_tokens)
            out = decoder.generate(input_ids, args.max_new_tokens)
            differences = [first_difference(out.new_tokens[0].tolist(), plain)]
            if reference is not None:
                ours = _generate(exact, input_ids, args.max_new_tokens)
                theirs = _generate_transformers(reference, input_ids, args.max_new_tokens)
                differences.append(first_difference(ours, theirs))
            wrong += sum(difference is not None for difference in differences)
            label = escape(printable(" ".join(prompt.text.split())[-28:]))
            rows.append([f"…{label}", str(len(plain)), f"{out.stats.acceptance_rate:.0%}", *map(_verdict, differences)])
    columns = ["prompt", "tokens", "accepted", f"self-speculative\n({options.weights_of(model)})"]
    title = (
        f"the tokens of {args.model} (E={decoder.exit_layer}, K={decoder.num_speculations}, drafts from "
        f"{decoder.draft_source}) are the same"
    )
    columns += ["transformers\n(float32)"] * (reference is not None)
    console.print(table(title, columns, rows))
    console.print(f"[red]{wrong} comparisons failed[/red]" if wrong else "[green]all tokens are identical[/green]")
    return 1 if wrong else 0


def _generate(decoder: SelfSpeculativeDecoder, input_ids: Tensor, new_tokens: int) -> list[int]:
    tokens: list[int] = decoder.generate(input_ids, new_tokens, strategy="autoregressive").new_tokens[0].tolist()
    return tokens


def _generate_transformers(model: Any, input_ids: Tensor, new_tokens: int) -> list[int]:
    mask = torch.ones_like(input_ids)
    out = model.generate(input_ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    tokens: list[int] = out[0, input_ids.shape[1] :].tolist()
    return tokens


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """The index of the first token that differs or is missing, or None."""
    if ours == theirs:
        return None
    shorter = min(len(ours), len(theirs))
    return next((index for index in range(shorter) if ours[index] != theirs[index]), shorter)


def _verdict(difference: int | None) -> str:
    return "[green]✓[/green]" if difference is None else f"[red]✗ at new token {difference}[/red]"
