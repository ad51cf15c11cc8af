"""Let a model continue prompts with all its layers, as pairs to train its early exits on: self-distillation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from .._files import write_atomically
from ..decoding import DraftHead
from . import options, prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(parser)
    parser.add_argument("--prompts", default="samples", help=prompts.HELP)
    parser.add_argument("--limit", type=options.positive, metavar="N", help="use this many prompts, spread over all")
    parser.add_argument("--max-prompt-tokens", type=options.positive, default=160, metavar="N", help="skip longer ones")
    parser.add_argument("--max-new-tokens", type=options.positive, default=96, metavar="N", help="tokens a prompt")
    parser.add_argument("--batch-size", type=options.positive, default=16, metavar="N", help="prompts at once")
    options.add_sampling(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file, for tasks or replay")
    parser.add_argument(
        "--draft-head", type=Path, metavar="FILE", help="also save a draft head of the tokens that are written most"
    )
    parser.add_argument("--draft-head-size", type=options.positive, default=8192, metavar="N", help="its tokens")


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the pairs, in the prompts' order."""
    from ..training.distill import own_pairs

    sampling = options.sampling(args)
    texts = [prompt.text for prompt in prompts.read(args.prompts, args.limit)]
    model, tokenizer = options.load(args, Console(stderr=True))
    vocabulary = model.config.vocab_size
    if args.draft_head is not None and args.draft_head_size > vocabulary:
        raise ValueError(f"--draft-head-size is {args.draft_head_size}, the vocabulary has {vocabulary} tokens")
    kept = [text for text in texts if len(tokenizer(text).input_ids) <= args.max_prompt_tokens]
    if not kept:
        raise ValueError(f"none of {len(texts)} prompts has at most {args.max_prompt_tokens} tokens")
    written = own_pairs(model, tokenizer, kept, args.max_new_tokens, args.batch_size, sampling)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        pairs = dict(progress.track(written, total=len(kept), description="writing continuations"))
    lines = (json.dumps(pairs[index], ensure_ascii=False) + "\n" for index in range(len(kept)))
    write_atomically(args.output, "".join(lines).encode())
    cut, skipped = sum(pair["cut"] for pair in pairs.values()), len(texts) - len(kept)
    console.print(f"wrote {len(pairs)} pairs to {args.output}; {cut} cut at their length, {skipped} prompts skipped")
    if args.draft_head is not None:
        tokens = (tokenizer(pair["completion"], add_special_tokens=False).input_ids for pair in pairs.values())
        head = DraftHead.from_tokens(tokens, vocabulary, tokenizer.eos_token_id, args.draft_head_size)
        console.print(f"wrote a draft head of {len(head.token_ids)} tokens to {head.save(args.draft_head)}")
    return 0
