"""Let a model continue prompts with all its layers, as pairs to train its early exits on: self-distillation.

Every pair is kept as it is written, in OUTPUT.partial: started again, the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from .._files import Journal, check_output, write_atomically
from ..decoding import DraftHead
from ..decoding.draft_model import FILE_NAME
from . import arguments, options


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the pairs, in the prompts' order."""
    outputs = [args.output, *([_draft_head_file(args.draft_head)] if args.draft_head else [])]
    for path in outputs:
        check_output(path, args.overwrite)
    texts = [prompt.text for prompt in arguments.read_prompts(args.prompts, args.limit)]
    model, tokenizer = options.load(args, Console(stderr=True))
    vocabulary = model.config.vocab_size
    if args.draft_head is not None and args.draft_head_size > vocabulary:
        raise ValueError(f"--draft-head-size is {args.draft_head_size}, the vocabulary has {vocabulary} tokens")
    kept = [text for text in texts if len(tokenizer(text).input_ids) <= args.max_prompt_tokens]
    if not kept:
        raise ValueError(f"none of {len(texts)} prompts has at most {args.max_prompt_tokens} tokens")
    journal = Journal(args.output.with_name(f"{args.output.name}.partial"), _work(args, texts), args.overwrite)
    pairs = _write_pairs(args, console, journal, model, tokenizer, kept)
    if args.draft_head is not None:
        tokens = (tokenizer(pair["completion"], add_special_tokens=False).input_ids for pair in pairs)
        head = DraftHead.from_tokens(tokens, vocabulary, tokenizer.eos_token_id, args.draft_head_size)
        console.print(f"wrote a draft head of {len(head.token_ids)} tokens to {head.save(args.draft_head)}")
    write_atomically(args.output, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs).encode())
    journal.remove()
    cut, skipped = sum(pair["cut"] for pair in pairs), len(texts) - len(kept)
    console.print(f"wrote {len(pairs)} pairs to {args.output}; {cut} cut at their length, {skipped} prompts skipped")
    return 0


def _work(args: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """What the pairs depend on."""
    keys = ("model", "dtype", "prompts", "limit", "max_prompt_tokens", "max_new_tokens",
            "temperature", "top_k", "top_p", "min_p", "seed")  # fmt: skip
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {**{key: getattr(args, key) for key in keys}, "device": args.device.type, "digest of the prompts": digest}


def _write_pairs(
    args: argparse.Namespace, console: Console, journal: Journal, model: Any, tokenizer: Any, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """The pairs of all prompts; those that the journal has are not written again."""
    from ..training.batching import own_pairs

    done: list[int] = [record["index"] for record in journal.records]
    if done:
        console.print(f"{len(done)} of {len(texts)} pairs are in {journal.path}, the others follow", soft_wrap=True)
    sampling = options.sampling(args)
    written = own_pairs(model, tokenizer, texts, args.max_new_tokens, args.batch_size, sampling, done)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            shown = progress.add_task("writing continuations", total=len(texts), completed=len(done))
            for index, pair in written:
                journal.append({"index": index, "pair": pair})
                progress.advance(shown)
    except KeyboardInterrupt:
        count = len(journal.records)
        message = (
            f"interrupted; {count} of {len(texts)} pairs are in {journal.path}, the same command goes on from there"
        )
        raise KeyboardInterrupt(message) from None
    finally:
        journal.close()
    return [record["pair"] for record in sorted(journal.records, key=lambda record: record["index"])]


def _draft_head_file(path: Path) -> Path:
    """Where `DraftHead.save` writes."""
    return path / FILE_NAME if path.is_dir() else path
