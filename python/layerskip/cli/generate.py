"""Continue a prompt, streaming the text to standard output and the statistics to standard error."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from ..decoding import Stats
from ..decoding.validation import STRATEGIES
from . import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("prompt", nargs="?", help="the text to continue; standard input if left out")
    options.add_model(parser)
    options.add_speculation(parser)
    options.add_sampling(parser)
    parser.add_argument("--strategy", choices=STRATEGIES, default="self_speculative")
    parser.add_argument("--max-new-tokens", type=options.positive, default=128, metavar="N")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def summary(stats: Stats) -> str:
    """One line about a call."""
    line = (
        f"{stats.new_tokens} tokens in {stats.seconds:.2f} s, first after {stats.time_to_first_token * 1e3:.0f} ms, "
        f"then {stats.decode_tokens_per_second:.1f} tokens/s"
    )
    if stats.drafted:
        line += f"; {stats.rounds} rounds, {stats.accepted} of {stats.drafted} drafts accepted"
        line += f" ({stats.acceptance_rate:.0%})"
    return line


def run(args: argparse.Namespace, console: Console) -> int:
    """Generate and stream."""
    from transformers import TextStreamer

    errors = Console(stderr=True)
    sampling = options.sampling(args)
    text = sys.stdin.read() if args.prompt is None else args.prompt
    model, tokenizer = options.load(args, errors)
    out = options.decoder(args, model).generate(
        options.encode(tokenizer, text, args.chat),
        max_new_tokens=args.max_new_tokens,
        strategy=args.strategy,
        sampling=sampling,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    errors.print(summary(out.stats), style="dim", highlight=False)
    return 0
