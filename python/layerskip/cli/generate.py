"""Continue a prompt; stream the text to standard output and the statistics to standard error."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from ..decoding.detokenizer import check_stop_strings
from . import options
from .rendering import TextPrinter, stats_line


def run(args: argparse.Namespace, console: Console) -> int:
    """Generate and stream."""
    errors = Console(stderr=True)
    sampling = options.sampling(args)
    stop_strings = check_stop_strings(args.stop)
    text = sys.stdin.read() if args.prompt is None else args.prompt
    model, tokenizer = options.load(args, errors)
    chat = args.chat or args.system is not None
    out = options.decoder(args, model).generate(
        options.encode(tokenizer, text, args.device, chat, args.system),
        max_new_tokens=args.max_new_tokens,
        strategy=args.strategy,
        sampling=sampling,
        streamer=TextPrinter(tokenizer, stop_strings),
        tokenizer=tokenizer,
        stop_strings=stop_strings,
    )
    errors.print(stats_line(out.stats), style="dim", highlight=False)
    return 0
