"""What the commands take. Nothing that is slow to import is imported here, so that a mistake is told at once."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import _ends
from ..registry import nearest
from .option_groups import (
    EVALUATIONS,
    STRATEGIES,
    add_device,
    add_exit,
    add_length,
    add_model,
    add_prompts,
    add_sampling,
    add_speculation,
    add_text,
    add_weights,
)
from .parser import Parser, number, one_of, positive, whole

CODES = (
    "Exit codes: 0 all is well, 1 a check or the work failed, 2 it cannot be done as it was asked for, 130 interrupted."
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with the name of the command in ``command``; SystemExit where there is nothing to run."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="layerskip", description="Early exit and self-speculative decoding.", epilog=CODES)
    version = f"layerskip-kernels {importlib.metadata.version('layerskip-kernels')}"
    parser.add_argument("--version", action="version", version=version, help="show it and exit")
    _ends.declare(parser)
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        parser.error(f"unknown command {command!r}; {nearest(command, COMMANDS)}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands = {}
    for name, (declare, summary, description) in COMMANDS.items():
        commands[name] = subparsers.add_parser(name, help=summary, description=description)
        declare(commands[name])
        _ends.declare(commands[name], default=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(words)
    if rest:
        commands[args.command].refuse(rest[0])
    return args


def _demo(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", default="smollm2", help="a demo that an installed package provides")
    add_device(parser)
    add_length(parser, 48)
    parser.add_argument(
        "--output", type=Path, default=Path("layerskip-demo.png"), metavar="FILE", help="the picture, written anew"
    )


def _generate(parser: Parser) -> None:
    parser.add_argument("prompt", nargs="?", help="the text to continue; standard input if left out")
    add_model(parser)
    add_weights(parser)
    add_speculation(parser)
    add_sampling(parser)
    parser.add_argument(
        "--strategy", type=one_of("strategy", STRATEGIES), default=STRATEGIES[0],
        metavar=f"{{{','.join(STRATEGIES)}}}", help="early_exit: the first layers alone, which is not lossless",
    )  # fmt: skip
    add_length(parser, 128)
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def _bench(parser: Parser) -> None:
    add_model(parser)
    add_weights(parser)
    add_speculation(parser)
    add_prompts(parser, 6)
    add_length(parser, 64)
    parser.add_argument(
        "--repeats", type=positive, default=1, metavar="N", help="how often to run each prompt each way"
    )
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[], metavar="B", help="measure batches, too: 1 2 4 8"
    )
    parser.add_argument(
        "--sweep", action="store_true",
        help="compare auto with every exit layer and number of drafts, each without a draft threshold and with one, "
        "by task",
    )  # fmt: skip
    parser.add_argument("--only-ours", action="store_true", help="leave transformers out")
    parser.add_argument(
        "--output", type=Path, default=Path("layerskip-bench"), metavar="STEM", help="writes STEM.json and STEM.png"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a JSON and PNG that are there")


def _correctness(parser: Parser) -> None:
    add_model(parser)
    add_weights(parser)
    add_speculation(parser)
    add_prompts(parser, 6)
    add_length(parser, 48)
    parser.add_argument("--skip-transformers", action="store_true", help="leave out the comparison in fp32")


def _train(parser: Parser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="a YAML file; without one every key has its default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe, e.g. steps=100"
    )
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="go on with the run of this recipe that is in the output")
    old.add_argument(
        "--overwrite", action="store_true", help="replace an older run in the output; files of others stay there"
    )
    add_device(parser)


def _train_exit(parser: Parser) -> None:
    parser.add_argument(
        "recipe", nargs="?", type=Path, help="a YAML file of the keys below, with _ for -, and of rarer ones"
    )
    parser.add_argument("--model", metavar="MODEL", help="whose drafts they are; it stays as it is (default: smollm2)")
    parser.add_argument(
        "--texts", nargs="+", metavar="TEXTS", help="what the model wrote: files of layerskip distill, or tasks"
    )
    parser.add_argument(
        "--eval-texts", nargs="+", metavar="TEXTS", help="held out, told apart by their task (default: 1 text in 20)"
    )
    parser.add_argument("--exit-layer", type=positive, metavar="E", help="layers before the exit (default: 2)")
    parser.add_argument("--blocks", type=whole, metavar="N", help="decoder layers of the exit's own (default: 1)")
    parser.add_argument("--head-rank", type=whole, metavar="R", help="of a correction of the head (default: 0, none)")
    parser.add_argument(
        "--draft-tokens",
        type=whole,
        metavar="N",
        help="how many tokens it may draft, the most frequent (default: 8192)",
    )
    parser.add_argument("--minutes", type=number, metavar="M", help="how long it trains (default: 30)")
    parser.add_argument("--steps", type=positive, metavar="N", help="train so many steps, however long they take")
    parser.add_argument("--learning-rate", type=number, metavar="RATE", help="its peak (default: 0.001)")
    parser.add_argument("--seed", type=whole, metavar="N", help="of the texts' order (default: 0)")
    parser.add_argument("--output", metavar="DIR", help="for exit.safetensors (default: layerskip-exit)")
    old = parser.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="go on with the run that is in the output")
    old.add_argument("--overwrite", action="store_true", help="replace an older run in the output")
    add_device(parser)


def _distill(parser: Parser) -> None:
    add_model(parser)
    add_prompts(parser, None)
    parser.add_argument("--max-prompt-tokens", type=positive, default=160, metavar="N", help="skip longer prompts")
    add_length(parser, 96)
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="prompts at once")
    add_sampling(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file, for tasks or replay")
    parser.add_argument(
        "--draft-head", type=Path, metavar="FILE", help="also save a draft head of the tokens that are written most"
    )
    parser.add_argument("--draft-head-size", type=positive, default=8192, metavar="N", help="its tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there, or begin anew")


def _exits(parser: Parser) -> None:
    add_model(parser)
    add_weights(parser)
    add_exit(parser)
    add_prompts(parser, 16)
    add_length(parser, 64)
    parser.add_argument("--num-speculations", type=positive, default=4, metavar="K", help="tokens drafted a round")
    parser.add_argument(
        "--output", type=Path, default=Path("exits"), metavar="STEM", help="writes STEM.json and STEM.png, anew"
    )


def _report(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="the JSON of bench, or of exits")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PAGE", help="such as report.html")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")


def _eval(parser: Parser) -> None:
    parser.add_argument(
        "tasks", nargs="+", type=one_of("task", EVALUATIONS), metavar="TASK", help=f"some of {', '.join(EVALUATIONS)}"
    )
    add_model(parser)
    add_weights(parser)
    add_speculation(parser)
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="ask so many of each task's questions, spread over all (default: all)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens of an answer, at most (default: what the task says)",
    )
    parser.add_argument(
        "--run-code", action="store_true", help="run the programs that humaneval has the model write, within limits"
    )
    add_text(parser, "perplexity is measured on")
    parser.add_argument(
        "--output", type=Path, default=Path("layerskip-eval.json"), metavar="FILE", help="the JSON to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there, or begin anew")


def _tune(parser: Parser) -> None:
    add_model(parser, positional=True)
    add_weights(parser)
    add_exit(parser)
    add_prompts(parser, 16)
    add_length(parser, 96)
    parser.add_argument("--chat", action="store_true", help="put the prompts into the model's chat template")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="what to write (default: layerskip.json beside the model)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there, or begin anew")


def _quantize(parser: Parser) -> None:
    add_model(parser, positional=True)
    add_weights(parser, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a directory to make")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="round with a look at what the first 2048 tokens of this text make of the states, which loses less "
        "(default: to nearest)",
    )  # fmt: skip
    add_text(parser, "the perplexity before and after is measured on")
    parser.add_argument(
        "--windows", type=whole, default=8, metavar="N", help="of 512 tokens, spread over the text; 0: no perplexity"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that was written there")


def _export(parser: Parser) -> None:
    add_model(parser)
    drafts = parser.add_mutually_exclusive_group(required=True)
    drafts.add_argument("--exit-layer", type=positive, metavar="E", help="how many of the layers draft")
    drafts.add_argument(
        "--exit", metavar="EXIT",
        help="a trained exit, which drafts: its directory or file, or the name of a model with one; only with --whole",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a directory to make")
    parser.add_argument(
        "--whole", action="store_true",
        help="write all layers, what drafts and K in config.json, and the exit or any draft head beside them",
    )  # fmt: skip
    parser.add_argument(
        "--num-speculations", type=positive, default=4, metavar="K", help="tokens drafted a round; only with --whole"
    )


def _env(parser: Parser) -> None:
    """There is nothing to choose."""


# Name -> what declares its options, a line about it, and its description.
COMMANDS: dict[str, tuple[Callable[[Parser], None], str, str]] = {
    "demo": (
        _demo, "decode a few prompts both ways, side by side",
        "Decode a few prompts autoregressively and self-speculatively, side by side; check that the tokens are the "
        "same.",
    ),
    "generate": (
        _generate, "continue a prompt",
        "Continue a prompt, streaming the text to standard output and the statistics to standard error.",
    ),
    "bench": (
        _bench, "measure decoding against the memory's speed and against transformers",
        "Measure greedy decoding four ways, interleaved: our autoregressive and self-speculative, and transformers' "
        "own.",
    ),
    "report": (
        _report, "show what bench and exits have measured as a page of HTML",
        "Write one page of HTML that loads nothing: the texts with the source of every token, what was accepted where, "
        "speed by exit layer and number of drafts, plots, tables.",
    ),
    "correctness": (
        _correctness, "check that self-speculative decoding changes no token",
        "Check that self-speculative decoding gives the autoregressive tokens, and that those are transformers' in "
        "fp32.",
    ),
    "train": (
        _train, "train early exits into a model, by a recipe",
        "Train early exits: a recipe in YAML, single keys of it set on the command line.",
    ),
    "train-exit": (
        _train_exit, "train an exit that drafts for a model as it is",
        "Train an exit for a frozen model: blocks after its first layers that only draft, so that the model's output "
        "stays what it is. The model runs over the texts once; what it made of them is kept in DIR/trunk.",
    ),
    "distill": (
        _distill, "let a model write the pairs that its early exits learn from",
        "Let a model continue prompts with all its layers, as pairs to train its early exits on: self-distillation. "
        "Every pair is kept as it is written, in FILE.partial: started again, the same command goes on where it was "
        "stopped.",
    ),
    "exits": (
        _exits, "show how good every layer's exit is, to choose the exit layer by",
        "Show how good every layer's exit is on a model's own text, and what n-grams find in it: agreement with the "
        "full depth, and calibration.",
    ),
    "eval": (
        _eval, "measure what answers are worth at full depth, at an early exit and with self-speculation",
        "Ask tasks at full depth, at an early exit alone and self-speculatively: exact match, programs that pass their "
        "tests, ROUGE, perplexity, accepted drafts; and check that self-speculation gives the full depth's tokens. "
        "Every answer is kept in FILE.partial: started again, the same command goes on where it was stopped.",
    ),
    "tune": (
        _tune, "measure which drafts are fastest on your prompts, and keep it beside the model",
        "Measure exit layers, numbers of drafts, heads and sources on prompts, half as many ways with twice as many "
        "prompts each time, and write the fastest to layerskip.json, which from_pretrained reads. Every measurement is "
        "kept in layerskip.json.partial: started again, the same command goes on where it was stopped.",
    ),
    "quantize": (
        _quantize, "write a model with packed weights",
        "Pack a model's weights, and write safetensors, configuration and tokenizer that every command and "
        "from_pretrained load again, packed as they are. Without a perplexity the plain model is never in memory.",
    ),
    "export": (
        _export, "write the first layers as a draft model for other engines, or a whole model for vLLM's plugin",
        "Write a model for other engines: its first layers as an ordinary draft model, or all of it for vLLM's plugin.",
    ),
    "env": (
        _env, "show versions, devices, and which backend serves each op",
        "Show versions, devices, and which backend serves each op and why the others do not.",
    ),
}  # fmt: skip
