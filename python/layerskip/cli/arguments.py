"""Command-line arguments and their validation.

Nothing that is slow to import is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

import argparse
import codecs
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .. import _ends, registry
from ..registry import nearest
from ..training import data
from ..training.data import load_task, splits


class Parser(argparse.ArgumentParser):
    """Says a default once, at the end of an option's help, and an error in one line."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As argparse has it. A default that the help does not tell in words is added to it."""
        default, text = settings.get("default"), settings.get("help", "")
        if default and default != argparse.SUPPRESS and "default" not in text:
            settings["help"] = f"{text} (default: %(default)s)"
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, word: str) -> NoReturn:
        """Exit for what no option or argument takes; the nearest option is told."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        text = re.sub(r"\x1b\[[\d;]*m", "", self.format_help())  # later versions of argparse colour it
        options = dict.fromkeys(re.findall(r"(?<!\w)--?[a-z][a-z-]*", text))
        self.error(f"unknown option {name}; {nearest(name, options)}")


def positive(text: str) -> int:
    """An argparse type: an int from 1 up."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_or_auto(text: str) -> int | str:
    """An argparse type: "auto", or an int from 1 up."""
    return text if text == "auto" else positive(text)


def whole(text: str) -> int:
    """An argparse type: an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def number(text: str) -> float:
    """An argparse type: a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of some names; for another one the nearest are told."""

    def parse_name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; {nearest(text, names)}")
        return text

    return parse_name


def device(text: str) -> str:
    """An argparse type: what looks like a device; whether it is there, torch will know."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}, expected auto, cpu, cuda or cuda:N")
    return text


HELP = "samples, TASK:SPLIT such as parsing:test, hub:DATASET, a .jsonl file, or a text file"
SAMPLES = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and the kind of task that it is."""

    text: str
    task: str = ""


def read_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """Read prompts.

    Parameters
    ----------
    source : str
        ``samples``, TASK:SPLIT as `layerskip.training.data` has them, such as ``parsing:test``, ``hub:NAME`` as
        `layerskip.training.data` has it, a ``.jsonl`` file of objects with "prompt" and, optionally, "task", or a
        text file with one prompt a line.
    limit : int, optional
        Take every n-th prompt so that this many remain, spread over the whole source.

    Raises
    ------
    ValueError
        With the file and the line, if a line cannot be used; for an unknown task or split, or where there is no prompt.
    FileNotFoundError
        If there is no such file.
    """
    check_prompts(source)
    if source.startswith(data.PREFIX):
        prompts = [Prompt(example.prompt) for example in data.load_hub(source, prompts_only=True)]
    elif _is_task(source):
        task, _, split = source.partition(":")
        prompts = [Prompt(example.prompt, task) for example in load_task(task, split) if example.prompt]
    else:
        prompts = _from_file(SAMPLES if source == "samples" else Path(source))
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def check_prompts(source: str) -> None:
    """Raise what `read` raises for a task, a split or a file that does not exist, without reading it."""
    if source.startswith(data.PREFIX) or source == "samples":
        return
    if _is_task(source):
        task, _, split = source.partition(":")
        registry.check(registry.TASKS, task)
        known = splits(task)
        if split not in known:
            raise ValueError(f"task {task} has no split {split!r}; {registry.nearest(split, known)}")
    elif not Path(source).is_file():
        raise FileNotFoundError(f"no prompts file at {source}{_meant(source)}")


def _is_task(source: str) -> bool:
    """TASK:SPLIT; what has a slash, or exists, is a file."""
    return ":" in source and "/" not in source and not Path(source).exists()


def _meant(source: str) -> str:
    """What may have been meant by a name that is no file."""
    if "/" in source or "." in source:
        return ""
    tasks = registry.names(registry.TASKS)
    if source in tasks:
        return f"; of the task {source}, name a split: {' or '.join(f'{source}:{split}' for split in splits(source))}"
    return f"; {registry.nearest(source, ['samples', *tasks])}"


def _from_file(path: Path) -> list[Prompt]:
    prompts = []
    for number, raw in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
        if line:
            prompts.append(_from_json(line, where) if path.suffix == ".jsonl" else Prompt(line))
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with a prompt, got {line[:40]}")
    text, task = record.get("prompt"), record.get("task", "")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: expected a text under "prompt", got {text!r}')
    if not isinstance(task, str):
        raise ValueError(f'{where}: expected a text under "task", got {task!r}')
    return Prompt(text, task)


DTYPES = ("bfloat16", "float16", "float32")
# As `layerskip_kernels.formats` has them, and the one of `layerskip.load`.
FORMATS = ("int8", "int8_g128", "int4", "int4_g128", "int4_zero", "int4_zero_g128", "fp8", "fp8_g128")
NATIVE = "native"
STRATEGIES = ("self_speculative", "autoregressive", "early_exit")  # as `layerskip.decoding.validation` has them
SOURCES = ("exit", "ngram", "auto")  # as `layerskip.decoding.draft_sources` has them


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
    parser.add_argument("--prompts", default="samples", metavar="PROMPTS", help=HELP)
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
    parser.add_argument(
        "--draft-layers", "--blocks", type=whole, metavar="N", help="extra layers of the exit (default: 1)"
    )
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
        "tasks", nargs="+", metavar="TASK",
        help="parsing, summarization, spec, perplexity, humaneval_local, any task of lm-eval, or the YAML file of one",
    )  # fmt: skip
    add_model(parser)
    add_weights(parser)
    add_speculation(parser)
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="use up to N questions of each task, spread over all (default: all)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="tokens of an answer, at most (default: what the task says)",
    )
    parser.add_argument(
        "--run-code", action="store_true",
        help="allow tasks, such as humaneval, to run the programs that the model writes; use a container",
    )  # fmt: skip
    parser.add_argument(
        "--include-path", type=Path, nargs="+", default=[], metavar="DIR", help="folders of other tasks, as YAML files"
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
        "Train an exit for a frozen model: layers after its first layers that only draft, so that the model's output "
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
        "Run tasks of lm-eval at full depth, at an early exit alone and with self-speculation, compare scores and "
        "accepted drafts, and check that self-speculation gives the full depth's tokens. Answers are cached in "
        "FILE.partial: run the same command again to continue.",
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


def validate_names(args: argparse.Namespace) -> None:
    """Raise where a command's arguments name what does not exist."""
    if args.command == "demo":
        registry.check(registry.DEMOS, args.name)
    if args.command in ("train", "train-exit") and args.recipe is not None:
        _check_recipe(args.recipe)
    if args.command == "report":
        _check_measurements(args.files)
    if "prompts" in args:
        check_prompts(args.prompts)
    if getattr(args, "model", None) is not None:
        _check_model(args.model)
    if isinstance(getattr(args, "draft_head", None), str):
        _check_draft_head(args.draft_head)
    if getattr(args, "exit", None) is not None:
        _check_part(args.exit, "exit", [])


def _check_model(name: str) -> None:
    """Raise for a model that no package provides and that is on no disk; what is on the hub is not looked up."""
    if name in registry.names(registry.MODELS):
        return
    if not registry.is_path(name):
        if "/" not in name:
            raise registry.unknown(registry.MODELS, name)
    elif not (path := Path(name).expanduser()).exists():
        raise FileNotFoundError(f"no such directory: {path}{_beside(path)}")


def tasks(names: Iterable[str]) -> None:
    """Raise for what is to be learned and is neither a task, nor a file, nor of the hub."""
    for name in names:
        if not name.startswith(data.PREFIX) and not Path(name).is_file():
            registry.check(registry.TASKS, name)


def _check_recipe(path: Path) -> None:
    """Raise where there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}{_beside(path)}")


def _check_measurements(paths: Iterable[Path]) -> None:
    """Raise where there is no such file."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no measurements at {path}{_beside(path)}")


def _check_draft_head(name: str) -> None:
    """Raise for a draft head that is no way of scoring, no model's, and on no disk."""
    _check_part(name, "draft head", ["full", "int8"])


def _check_part(name: str, what: str, ways: list[str]) -> None:
    known = [*ways, *registry.names(registry.MODELS)]
    if name in known or Path(name).expanduser().exists():
        return
    if name in registry.EXAMPLE[registry.MODELS]:
        raise registry.unknown(registry.MODELS, name)
    hint = _beside(Path(name)) or ("" if "/" in name else f"; {registry.nearest(name, known)}")
    raise FileNotFoundError(f"no {what} at {name}{hint}")


def _beside(path: Path) -> str:
    """Of what lies in the same folder, that with the nearest names."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return ""
    hint = registry.nearest(path.name, sorted(entry.name for entry in folder.iterdir()))
    return f"; {hint}" if hint.startswith("did you mean") else ""
