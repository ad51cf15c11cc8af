"""Let a model continue prompts with all its layers, as pairs to train its early exits on: self-distillation.

Each pair is saved in OUTPUT.partial when it is written: run the same command again to continue.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from .._files import check_output, write_atomically
from ..decoding import DraftHead
from ..decoding.draft_model import FILE_NAME
from . import arguments, options

WORK = (
    "model", "dtype", "prompts", "limit", "max_prompt_tokens", "max_new_tokens", "temperature", "top_k", "top_p",
    "min_p", "seed",
)  # fmt: skip
"""The options that the pairs depend on."""


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the pairs, in the order of the prompts."""
    from ..training.batching import own_pairs

    head_file = args.draft_head
    if head_file is not None and head_file.is_dir():
        head_file = head_file / FILE_NAME  # where `DraftHead.save` writes
    for path in filter(None, (args.output, head_file)):
        check_output(path, args.overwrite, (args.prompts,))
    texts = [prompt.text for prompt in arguments.read_prompts(args.prompts, args.limit)]
    model, tokenizer = options.load(args, Console(stderr=True))
    vocabulary = model.config.vocab_size
    if args.draft_head is not None and args.draft_head_size > vocabulary:
        raise ValueError(f"--draft-head-size is {args.draft_head_size}, the vocabulary has {vocabulary} tokens")
    kept = [text for text in texts if len(tokenizer(text).input_ids) <= args.max_prompt_tokens]
    if not kept:
        raise ValueError(f"none of {len(texts)} prompts has at most {args.max_prompt_tokens} tokens")
    journal, _ = options.open_journal(args, args.output, WORK, texts)
    done: list[int] = [record["index"] for record in journal.records]
    sampling = options.sampling(args)
    with options.journaled(journal, "pairs", len(kept), console) as append:
        for index, pair in own_pairs(model, tokenizer, kept, args.max_new_tokens, args.batch_size, sampling, done):
            append({"index": index, "pair": pair})
    pairs = [record["pair"] for record in sorted(journal.records, key=lambda record: record["index"])]
    if args.draft_head is not None:
        tokens = (tokenizer(pair["completion"], add_special_tokens=False).input_ids for pair in pairs)
        head = DraftHead.from_tokens(tokens, vocabulary, tokenizer.eos_token_id, args.draft_head_size)
        console.print(f"wrote a draft head of {len(head.token_ids)} tokens to {head.save(args.draft_head)}")
    write_atomically(args.output, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs).encode())
    journal.remove()
    cut, skipped = sum(pair["cut"] for pair in pairs), len(texts) - len(kept)
    console.print(
        f"wrote {len(pairs)} pairs to {args.output}; {cut} cut at --max-new-tokens, {skipped} prompts skipped"
    )
    return 0
