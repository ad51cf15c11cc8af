"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from .. import models
from ..decoding import DraftHead, SamplingParams, SelfSpeculativeDecoder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODELS = "a directory, a hub name, or a name that a package provides, such as smollm2"


def positive(text: str) -> int:
    """An argparse type: an int from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_or_auto(text: str) -> int | str:
    """An argparse type: "auto", or an int from 1 up."""
    return text if text == "auto" else positive(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, in which dtype, on how many threads."""
    parser.add_argument("--model", default="smollm2", help=MODELS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument("--threads", type=positive, help="how many CPU threads to use (default: torch's choice)")


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """How to draft."""
    parser.add_argument(
        "--exit-layer", type=positive_or_auto, metavar="E", help="layers that draft, or auto (default: a quarter)"
    )
    parser.add_argument(
        "--num-speculations", type=positive_or_auto, default=4, metavar="K", help="tokens drafted a round, or auto"
    )
    parser.add_argument(
        "--draft-threshold",
        type=float,
        default=0.0,
        metavar="P",
        help="end a draft at a token less probable than P, in 0 … 1 (default: 0, never)",
    )
    parser.add_argument(
        "--draft-head",
        default="full",
        metavar="HEAD",
        help="full, int8, a file or directory with a saved draft head, or the name of a model that comes with one",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; ranges are checked by `SamplingParams`."""
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N largest; 0: from all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable, of P in all"
    )
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from those of P times the largest")
    parser.add_argument("--seed", type=int, help="the same tokens every time (default: others every time)")


def sampling(args: argparse.Namespace) -> SamplingParams:
    """What the options say."""
    return SamplingParams(args.temperature, args.top_k, args.top_p, args.min_p, seed=args.seed)


def load(args: argparse.Namespace, console: Console, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The transformers model and tokenizer that the options name."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _quiet_transformers()
    with console.status(f"loading {args.model}"):
        return models.load(args.model, dtype or DTYPES[args.dtype])


def _quiet_transformers() -> None:
    """Its progress bars and advice would run through what the commands print."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # loading says what is missing
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def exit_layer(args: argparse.Namespace, model: Any) -> int | str:
    """What the options say, or a quarter of the layers."""
    return args.exit_layer or max(1, model.config.num_hidden_layers // 4)


def draft_head(args: argparse.Namespace) -> str | DraftHead:
    """What scores the drafts."""
    if args.draft_head in ("full", "int8"):
        return args.draft_head
    return DraftHead.load(args.draft_head)


def decoder(args: argparse.Namespace, model: Any) -> SelfSpeculativeDecoder:
    """A decoder as the options want it."""
    return SelfSpeculativeDecoder(
        model,
        exit_layer(args, model),
        args.num_speculations,
        draft_head=draft_head(args),
        draft_threshold=args.draft_threshold,
    )


def encode(tokenizer: Any, text: str, chat: bool = False) -> torch.Tensor:
    """Token ids [1, N] of a text, or of a conversation in which the user says it."""
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template; leave out --chat")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
