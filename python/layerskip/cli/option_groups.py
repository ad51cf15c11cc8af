"""Options that several commands take, in groups."""

from __future__ import annotations

from pathlib import Path

from . import prompts
from .parser import Parser, device, number, one_of, positive, positive_or_auto, whole

DTYPES = ("bfloat16", "float16", "float32")
# As `layerskip_kernels.formats` has them, and the one of `layerskip.load`.
FORMATS = ("int8", "int8_g128", "int4", "int4_g128", "int4_zero", "int4_zero_g128", "fp8", "fp8_g128")
NATIVE = "native"
STRATEGIES = ("self_speculative", "autoregressive", "early_exit")  # as `layerskip.decoding.validation` has them
SOURCES = ("exit", "ngram", "auto")  # as `layerskip.decoding.source` has them
EVALUATIONS = (
    "parsing",
    "humaneval",
    "summarization",
    "spec",
    "perplexity",
)  # as `layerskip.evaluation.tasks` has them


def add_device(parser: Parser) -> None:
    """Where to compute."""
    parser.add_argument(
        "--device", type=device, default="auto", metavar="DEVICE",
        help="cpu, cuda, cuda:N, or auto, a card where torch sees one",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="how many CPU threads to use (default: torch's choice)"
    )


def add_model(parser: Parser, positional: bool = False) -> None:
    """Which model, in which dtype, and where."""
    text = "a directory, a hub name, or a name that a package provides, such as smollm2"
    if positional:
        parser.add_argument("model", metavar="MODEL", help=text)
    else:
        parser.add_argument("--model", default="smollm2", metavar="MODEL", help=text)
    parser.add_argument(
        "--dtype", type=one_of("dtype", DTYPES), default="bfloat16", metavar=f"{{{','.join(DTYPES)}}}",
        help="of the weights",
    )  # fmt: skip
    add_device(parser)


def add_weights(parser: Parser, required: bool = False) -> None:
    """In which format the weights are packed."""
    choices = (*FORMATS, NATIVE)
    parser.add_argument(
        "--weights", type=one_of("weight format", choices), required=required, metavar="FORMAT",
        help=f"quantize them: {', '.join(FORMATS)}; or native, as the model's own file has them"
        + ("" if required else " (default: as they are)"),
    )  # fmt: skip


def add_speculation(parser: Parser) -> None:
    """How to draft."""
    parser.add_argument(
        "--exit-layer",
        type=positive_or_auto,
        metavar="E",
        help="layers that draft, or auto (default: the exit's, or a quarter)",
    )
    parser.add_argument(
        "--num-speculations", type=positive_or_auto, default=4, metavar="K", help="tokens drafted a round, or auto"
    )
    parser.add_argument(
        "--draft-threshold", type=number, default=0.0, metavar="P",
        help="end a draft at a token less probable than P, in 0 … 1 (default: 0, never)",
    )  # fmt: skip
    parser.add_argument(
        "--draft-head", metavar="HEAD",
        help="full, int8, a file or directory with a saved draft head, or the name of a model that comes with one "
        "(default: the exit's own, or full)",
    )  # fmt: skip
    add_exit(parser)


def add_exit(parser: Parser) -> None:
    """What was trained to draft."""
    parser.add_argument(
        "--exit", metavar="EXIT",
        help="draft with a trained exit: its directory or file, or the name of a model that comes with one "
        "(default: the model's own layers)",
    )  # fmt: skip
    parser.add_argument(
        "--draft-source", type=one_of("draft source", SOURCES), default=SOURCES[0],
        metavar=f"{{{','.join(SOURCES)}}}",
        help="exit: the first layers draft; ngram: what followed the last tokens where they occurred before; auto: "
        "whichever is faster, round by round",
    )  # fmt: skip


def add_sampling(parser: Parser) -> None:
    """How tokens are chosen; ranges are checked by `SamplingParams`."""
    parser.add_argument("--temperature", type=number, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-k", type=whole, default=0, metavar="N", help="draw from the N largest (default: all)")
    parser.add_argument(
        "--top-p", type=number, default=1.0, metavar="P", help="draw from the most probable, of P in all"
    )
    parser.add_argument(
        "--min-p", type=number, default=0.0, metavar="P", help="draw from those of P times the largest (default: all)"
    )
    parser.add_argument("--seed", type=whole, metavar="N", help="the same tokens every time (default: others)")


def add_prompts(parser: Parser, limit: int | None) -> None:
    """Which prompts, and how many of them."""
    parser.add_argument("--prompts", default="samples", metavar="PROMPTS", help=prompts.HELP)
    text = (
        "use this many prompts, spread over all" if limit else "use this many prompts, spread over all (default: all)"
    )
    parser.add_argument("--limit", type=positive, default=limit, metavar="N", help=text)


def add_text(parser: Parser, purpose: str) -> None:
    """Which long text."""
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help=f"what {purpose} (default: Python's manual, of its standard library)",
    )  # fmt: skip


def add_length(parser: Parser, default: int) -> None:
    """How long a continuation is."""
    parser.add_argument(
        "--max-new-tokens", type=positive, default=default, metavar="N", help="tokens after a prompt, at most"
    )
