"""Continue a prompt; stream the text to standard output and the statistics to standard error."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from .._imports import printable
from . import options
from .rendering import Drafts


def run(args: argparse.Namespace, console: Console) -> int:
    """Generate and stream."""
    from transformers import TextStreamer

    errors = Console(stderr=True)
    sampling = options.sampling(args)
    text = sys.stdin.read() if args.prompt is None else args.prompt
    model, tokenizer = options.load(args, errors)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if sys.stdout.isatty():
        show = streamer.on_finalized_text
        streamer.on_finalized_text = lambda text, stream_end=False: show(printable(text), stream_end)  # type: ignore[method-assign]
    out = options.decoder(args, model).generate(
        options.encode(tokenizer, text, args.device, args.chat),
        max_new_tokens=args.max_new_tokens,
        strategy=args.strategy,
        sampling=sampling,
        streamer=streamer,
    )
    stats = out.stats
    line = (
        f"{stats.new_tokens} tokens in {stats.seconds:.2f} s, first after {stats.time_to_first_token * 1e3:.0f} ms, "
        f"then {stats.decode_tokens_per_second:.1f} tokens/s"
    )
    if stats.drafted:
        line += f"; {stats.rounds} rounds, {stats.accepted} of {stats.drafted} drafts accepted"
        line += f" ({stats.acceptance_rate:.0%})"
    if len(stats.by_source) > 1:
        line += f": {Drafts.of(stats)}"
    errors.print(line, style="dim", highlight=False)
    return 0
