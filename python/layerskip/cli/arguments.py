"""Command-line arguments and their validation.

This module imports neither torch nor transformers, so that a mistake is reported at once.
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
from typing import Any, NamedTuple, NoReturn

from .. import _ends, registry
from ..registry import nearest
from ..training import data
from ..training.data import load_task, splits

DTYPES = ("bfloat16", "float16", "float32")
# The following repeat names of the library, whose modules import torch; a test compares them.
FORMATS = ("int8", "int8_g128", "int4", "int4_g128", "int4_zero", "int4_zero_g128", "fp8", "fp8_g128")
NATIVE = "native"
NO_EXIT = "none"
STRATEGIES = ("self_speculative", "autoregressive", "early_exit")
SOURCES = ("exit", "ngram", "auto")

SAMPLES = Path(__file__).parents[1] / "data" / "prompts.jsonl"


class Parser(argparse.ArgumentParser):
    """An argument parser that states each default once, and each error in one line."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an argument; a default that its help does not mention is appended to the help."""
        default, text = settings.get("default"), settings.get("help", "")
        if default and default != argparse.SUPPRESS and "default" not in text:
            settings["help"] = f"{text} (default: %(default)s)"
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, word: str) -> NoReturn:
        """Exit for a word that is no option or argument, naming the nearest option."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        text = re.sub(r"\x1b\[[\d;]*m", "", self.format_help())  # later versions of argparse colour it
        options = dict.fromkeys(re.findall(r"(?<!\w)--?[a-z][a-z-]*", text))
        self.error(f"unknown option {name}; {nearest(name, options)}")


def whole(text: str) -> int:
    """Argparse type: an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """Argparse type: an int from 1 up."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_or_auto(text: str) -> int | str:
    """Argparse type: "auto", or an int from 1 up."""
    return text if text == "auto" else positive(text)


def number(text: str) -> float:
    """Argparse type: a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    """Argparse type: one of ``names``; the error for another name lists the nearest."""

    def parse_name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r}; {nearest(text, names)}")
        return text

    return parse_name


def device(text: str) -> str:
    """Argparse type: a device name; whether the device exists is checked once torch is imported."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}, expected auto, cpu, cuda or cuda:N")
    return text


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and its task."""

    text: str
    task: str = ""


def read_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """Read prompts.

    Parameters
    ----------
    source : str
        ``samples``; TASK:SPLIT or ``hub:NAME`` as in `layerskip.training.data`, such as ``parsing:test``; a ``.jsonl``
        file of objects with "prompt" and optionally "task"; or a text file with one prompt a line.
    limit : int, optional
        Number of prompts to take, spread over the whole source.

    Raises
    ------
    ValueError
        For a malformed line (with file and line number), an unknown task or split, or no prompts.
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
    """Raise for a task, split or file that does not exist, without reading it."""
    if source.startswith(data.PREFIX) or source == "samples":
        return
    if _is_task(source):
        task, _, split = source.partition(":")
        registry.check(registry.TASKS, task)
        known = splits(task)
        if split not in known:
            raise ValueError(f"task {task} has no split {split!r}; {registry.nearest(split, known)}")
    elif not Path(source).is_file():
        raise FileNotFoundError(f"no prompts file at {source}{_suggestion(source)}")


def _is_task(source: str) -> bool:
    return ":" in source and "/" not in source and not Path(source).exists()


def _suggestion(source: str) -> str:
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


class Option(NamedTuple):
    """An argument of a command, as `argparse.ArgumentParser.add_argument` takes it."""

    names: Sequence[str]
    settings: dict[str, Any]


class Exclusive(NamedTuple):
    """Options of which a command takes at most one, or exactly one."""

    options: Sequence[Option]
    required: bool = False


class Command(NamedTuple):
    """A command: one line for ``layerskip --help``, a description for its own, and its arguments."""

    summary: str
    description: str
    options: Sequence[Option | Exclusive]


def option(names: str, help: str, **settings: Any) -> Option:
    """An argument with its space-separated names."""
    return Option(names.split(), {"help": help, **settings})


def flag(name: str, help: str) -> Option:
    """An option without a value."""
    return option(name, help, action="store_true")


def choice(name: str, what: str, names: Sequence[str], help: str) -> Option:
    """An option with one of ``names``, by default the first."""
    return option(name, help, type=one_of(what, names), default=names[0], metavar=f"{{{','.join(names)}}}")


def output(metavar: str, help: str, **settings: Any) -> Option:
    """The file or directory that a command writes."""
    return option("--output", help, type=Path, metavar=metavar, **settings)


def prompts(limit: int | None) -> Sequence[Option]:
    """Which prompts, and how many of them."""
    text = "use N prompts, spread over all" + ("" if limit else " (default: all)")
    return (
        option("--prompts", "samples, TASK:SPLIT such as parsing:test, hub:DATASET, a .jsonl file, or a text file",
               default="samples", metavar="PROMPTS"),
        option("--limit", text, type=positive, default=limit, metavar="N"),
    )  # fmt: skip


def length(default: int) -> Option:
    """How long a continuation is."""
    return option("--max-new-tokens", "tokens after a prompt, at most", type=positive, default=default, metavar="N")


def text(purpose: str) -> Option:
    """Which long text."""
    return option("--text", f"what {purpose} (default: Python's manual, of its standard library)", type=Path,
                  metavar="FILE")  # fmt: skip


def weights(required: bool = False) -> Option:
    """In which format the weights are packed."""
    help = f"quantize them: {', '.join(FORMATS)}; or native, as in the model's own file"
    return option("--weights", help + ("" if required else " (default: as they are)"),
                  type=one_of("weight format", (*FORMATS, NATIVE)), required=required, metavar="FORMAT")  # fmt: skip


# fmt: off
DEVICE = (
    option("--device", "cpu, cuda, cuda:N, or auto, a GPU if torch sees one", type=device, default="auto",
           metavar="DEVICE"),
    option("--threads", "number of CPU threads (default: torch's choice)", type=positive, metavar="N"),
)
MODEL_HELP = "a directory, a hub name, or a name that a package provides, such as smollm2"
LOADED = (choice("--dtype", "dtype", DTYPES, "of the weights"), *DEVICE)
MODEL = (option("--model", MODEL_HELP, default="smollm2", metavar="MODEL"), *LOADED)
POSITIONAL_MODEL = (option("model", MODEL_HELP, metavar="MODEL"), *LOADED)
NUM_SPECULATIONS = option("--num-speculations", "draft tokens a round", type=positive, default=4, metavar="K")
EXIT = (
    option("--exit", "draft with a trained exit: its directory or file, or the name of a model that comes with one; "
           "none: with the model's own layers (default: the exit that an installed package has for this model)",
           metavar="EXIT"),
    option("--draft-source", "exit: the first layers draft; ngram: what followed the last tokens where they occurred "
           "before; auto: whichever is faster, or none, round by round (default: auto, or exit with fixed layers or "
           "tokens)", type=one_of("draft source", SOURCES), metavar=f"{{{','.join(SOURCES)}}}"),
)
SPECULATION = (
    option("--exit-layer", "number of layers that draft, or auto (default: the exit's, or auto)",
           type=positive_or_auto, metavar="E"),
    option("--num-speculations", "draft tokens a round, or auto (default: auto, or 4 with --exit-layer)",
           type=positive_or_auto, metavar="K"),
    option("--draft-threshold", "end a draft at a token less probable than P, in 0 … 1 (default: 0, never)",
           type=number, metavar="P"),
    option("--draft-head", "full, int8, a file or directory with a saved draft head, or the name of a model that comes "
           "with one (default: the exit's own, or full)", metavar="HEAD"),
    *EXIT,
)
SAMPLING = (  # `SamplingParams` checks the ranges
    option("--temperature", "0, the default, is greedy", type=number, default=0.0, metavar="T"),
    option("--top-k", "sample from the N largest (default: all)", type=whole, default=0, metavar="N"),
    option("--top-p", "sample from the most probable, of total probability P", type=number, default=1.0, metavar="P"),
    option("--min-p", "sample from those at least P times as probable as the largest (default: all)", type=number,
           default=0.0, metavar="P"),
    option("--seed", "give the same tokens every time (default: a random seed)", type=whole, metavar="N"),
)
MAX_SEQ_LEN = option("--max-seq-len", "longest prompt and answer together, in tokens (default: 4096, or the model's if "
                     "that is less)", type=positive, metavar="N")
STOP = option("--stop", "end before this text; may be given several times", action="append", metavar="TEXT")
CHAT = flag("--chat", "apply the model's chat template to the prompt")

COMMANDS = {
    "demo": Command(
        "decode a few prompts both ways, side by side",
        "Decode a few prompts autoregressively and self-speculatively, side by side; check that the tokens are the "
        "same.", (
            option("name", "a demo that an installed package provides", nargs="?", default="smollm2"),
            *DEVICE, length(96),
            output("FILE", "the picture, replaced if it exists", default="layerskip-demo.png"),
        ),
    ),
    "generate": Command(
        "continue a prompt",
        "Continue a prompt; stream the text to standard output and the statistics to standard error.", (
            option("prompt", "the text to continue; standard input if left out", nargs="?"),
            *MODEL, weights(), *SPECULATION, *SAMPLING,
            choice("--strategy", "strategy", STRATEGIES, "early_exit: the first layers alone, which is not lossless"),
            length(128), STOP, CHAT,
            option("--system", "a system message before the prompt; implies --chat", metavar="TEXT"),
        ),
    ),
    "chat": Command(
        "talk to a model in the terminal",
        "Answer lines of standard input in the model's chat template: messages and, after a slash, commands that /help "
        "lists. Ctrl-C stops an answer, Ctrl-D ends.", (
            option("model", MODEL_HELP, nargs="?", default="smollm2", metavar="MODEL"),
            *LOADED, weights(), *SPECULATION, *SAMPLING,
            option("--max-new-tokens", "tokens of an answer, at most (default: up to the end of the context)",
                   type=positive, metavar="N"),
            MAX_SEQ_LEN,
            option("--system", "a system message before the others", metavar="TEXT"),
        ),
    ),
    "serve": Command(
        "serve a model over HTTP, in the form of OpenAI's API",
        "Serve a model over HTTP, in the form of OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, "
        "/health, /metrics. Ctrl-C or SIGTERM lets running requests finish for some seconds, and stops.", (
            *POSITIONAL_MODEL, weights(), *SPECULATION,
            option("--host", "the address to listen on; other machines reach 0.0.0.0", default="127.0.0.1",
                   metavar="HOST"),
            option("--port", "the port; 0: any free one", type=whole, default=8000, metavar="PORT"),
            option("--api-key", "what requests to /v1 must carry (default: that of the environment variable "
                   "LAYERSKIP_API_KEY, or none)", metavar="KEY"),
            option("--max-batch", "requests that run at once", type=positive, default=8, metavar="N"),
            option("--max-waiting", "requests that may wait beyond these; others get the status 429", type=whole,
                   default=64, metavar="N"),
            MAX_SEQ_LEN,
        ),
    ),
    "bench": Command(
        "compare decoding with the memory's speed and with transformers",
        "Measure greedy decoding four ways, interleaved: our autoregressive and self-speculative, and transformers' "
        "own.", (
            *MODEL, weights(), *SPECULATION, *prompts(6), length(64),
            option("--repeats", "how often to run each prompt each way", type=positive, default=1, metavar="N"),
            option("--batch-sizes", "measure batches, too: 1 2 4 8", type=positive, nargs="+", default=[], metavar="B"),
            flag("--sweep", "compare auto with every exit layer and number of draft tokens, without a draft threshold "
                 "and with one, by task"),
            flag("--only-ours", "leave transformers out"),
            output("STEM", "writes STEM.json and STEM.png", default="layerskip-bench"),
            flag("--overwrite", "replace an existing JSON and PNG"),
        ),
    ),
    "report": Command(
        "show the results of bench and exits as a page of HTML",
        "Write one page of HTML that loads nothing: the texts with the source of every token, what was accepted where, "
        "speed by exit layer and number of draft tokens, plots, tables.", (
            option("files", "the JSON of bench, or of exits", nargs="+", type=Path, metavar="FILE"),
            option("-o --output", "such as report.html", type=Path, required=True, metavar="PAGE"),
            flag("--overwrite", "replace an existing page"),
        ),
    ),
    "correctness": Command(
        "check that self-speculative decoding changes no token",
        "Check that self-speculative decoding gives the autoregressive tokens, and that those are transformers' in "
        "fp32.", (
            *MODEL, weights(), *SPECULATION, *prompts(6), length(48),
            flag("--skip-transformers", "leave out the comparison in fp32"),
        ),
    ),
    "train": Command(
        "train early exits into a model, by a recipe",
        "Train early exits by a recipe in YAML, of which the command line can override keys.", (
            option("recipe", "a YAML file; by default every key has its default", nargs="?", type=Path),
            option("--set", "override a key of the recipe, e.g. steps=100", action="append", default=[],
                   metavar="KEY=VALUE"),
            Exclusive((
                flag("--resume", "continue the run of this recipe in the output directory"),
                flag("--overwrite", "replace an older run in the output directory; files of others stay there"),
            )),
            *DEVICE,
        ),
    ),
    "train-exit": Command(
        "train an exit that drafts for a frozen model",
        "Train an exit for a frozen model: layers after its first layers that only draft, so that the model's output "
        "stays the same. The model runs over the texts once; its hidden states are cached in DIR/trunk.", (
            option("recipe", "a YAML file of the keys below, with _ for -, and of rarer ones", nargs="?", type=Path),
            option("--model", "the frozen model (default: smollm2)", metavar="MODEL"),
            option("--texts", "text that the model wrote: files of layerskip distill, or tasks", nargs="+",
                   metavar="TEXTS"),
            option("--eval-texts", "held-out text, reported by task (default: 1 text in 20)", nargs="+",
                   metavar="TEXTS"),
            option("--exit-layer", "layers before the exit (default: 2)", type=positive, metavar="E"),
            option("--draft-layers --blocks", "number of the exit's own decoder layers (default: 1)", type=whole,
                   metavar="N"),
            option("--head-rank", "rank of a correction of the head (default: 0, none)", type=whole, metavar="R"),
            option("--draft-tokens", "size of the draft vocabulary, the most frequent tokens (default: 8192)",
                   type=whole, metavar="N"),
            option("--minutes", "time to train (default: 30)", type=number, metavar="M"),
            option("--steps", "train N steps, however long they take", type=positive, metavar="N"),
            option("--learning-rate", "peak learning rate (default: 0.001)", type=number, metavar="RATE"),
            option("--seed", "of the order of the texts (default: 0)", type=whole, metavar="N"),
            option("--output", "directory for exit.safetensors (default: layerskip-exit)", metavar="DIR"),
            Exclusive((
                flag("--resume", "continue the run in the output directory"),
                flag("--overwrite", "replace an older run in the output directory"),
            )),
            *DEVICE,
        ),
    ),
    "distill": Command(
        "let a model write the pairs that its early exits learn from",
        "Let a model continue prompts with all its layers, as pairs to train its early exits on: self-distillation. "
        "Each pair is saved in FILE.partial when it is written: run the same command again to continue.", (
            *MODEL, *prompts(None),
            option("--max-prompt-tokens", "skip longer prompts", type=positive, default=160, metavar="N"),
            length(96),
            option("--batch-size", "prompts in a batch", type=positive, default=16, metavar="N"),
            *SAMPLING,
            output("FILE", "a .jsonl file, for tasks or replay", required=True),
            option("--draft-head", "also save a draft head of the most frequent tokens written", type=Path,
                   metavar="FILE"),
            option("--draft-head-size", "number of its tokens", type=positive, default=8192, metavar="N"),
            flag("--overwrite", "replace existing files, or start over"),
        ),
    ),
    "exits": Command(
        "show how good every layer's exit is, to choose the exit layer",
        "Show how good every layer's exit is on a model's own text, and what n-grams find in it: agreement with the "
        "full depth, and calibration.", (
            *MODEL, weights(), *EXIT, *prompts(16), length(64), NUM_SPECULATIONS,
            output("STEM", "writes STEM.json and STEM.png", default="exits"),
            flag("--overwrite", "replace an existing JSON and PNG"),
        ),
    ),
    "eval": Command(
        "measure what answers are worth at full depth, at an early exit and with self-speculation",
        "Run tasks of lm-eval at full depth, at an early exit alone and with self-speculation, compare scores and "
        "accepted drafts, and check that self-speculation gives the full depth's tokens. Answers are cached in "
        "FILE.partial: run the same command again to continue.", (
            option("tasks", "parsing, summarization, spec, perplexity, humaneval_local, any task of lm-eval, or the "
                   "YAML file of one", nargs="+", metavar="TASK"),
            *MODEL, weights(), *SPECULATION,
            option("--limit", "use up to N questions of each task, spread over all (default: all)", type=positive,
                   metavar="N"),
            option("--max-new-tokens", "tokens of an answer, at most (default: what the task says)", type=positive,
                   metavar="N"),
            flag("--run-code", "allow tasks, such as humaneval, to run the programs that the model writes; use a "
                 "container"),
            option("--include-path", "folders of other tasks, as YAML files", type=Path, nargs="+", default=[],
                   metavar="DIR"),
            text("perplexity is measured on"),
            output("FILE", "the JSON to write", default="layerskip-eval.json"),
            flag("--overwrite", "replace an existing file, or start over"),
        ),
    ),
    "tune": Command(
        "find the fastest way to draft on your prompts, and save it beside the model",
        "Measure exit layers, numbers of draft tokens, heads and sources on prompts, half as many candidates with "
        "twice as many prompts each time, and write the fastest to layerskip.json, which from_pretrained reads. Each "
        "measurement is saved in layerskip.json.partial: run the same command again to continue.", (
            *POSITIONAL_MODEL, weights(), *EXIT, *prompts(16), length(96), CHAT,
            output("FILE", "the file to write (default: layerskip.json beside the model)"),
            flag("--overwrite", "replace an existing file, or start over"),
        ),
    ),
    "quantize": Command(
        "write a model with packed weights",
        "Pack a model's weights, and write safetensors, configuration and tokenizer that every command and "
        "from_pretrained load again as packed weights. Without a perplexity the plain model is never in memory.", (
            *POSITIONAL_MODEL, weights(required=True),
            output("DIR", "a directory to create", required=True),
            option("--calibration", "calibrate the rounding on the hidden states of the first 2048 tokens of this "
                   "text, which loses less (default: round to nearest)", type=Path, metavar="FILE"),
            text("the perplexity before and after is measured on"),
            option("--windows", "windows of 512 tokens, spread over the text; 0: no perplexity", type=whole, default=8,
                   metavar="N"),
            flag("--overwrite", "replace a model that was written there"),
        ),
    ),
    "export": Command(
        "write the first layers as a draft model for other engines, or a whole model for vLLM's plugin",
        "Write a model for other engines: its first layers as an ordinary draft model, or all of it for vLLM's "
        "plugin.", (
            *MODEL,
            Exclusive((
                option("--exit-layer", "number of layers that draft", type=positive, metavar="E"),
                option("--exit", "draft with a trained exit: its directory or file, or the name of a model that comes "
                       "with one; only with --whole", metavar="EXIT"),
            ), required=True),
            output("DIR", "a directory to create", required=True),
            flag("--whole", "write all layers, the exit layer and K in config.json, and the exit or any draft head "
                 "beside them"),
            option("--num-speculations", "draft tokens a round; only with --whole", type=positive, default=4,
                   metavar="K"),
            flag("--overwrite", "replace a model that was written there"),
        ),
    ),
    "env": Command(
        "show versions, devices, and which backend serves each op",
        "Show versions, devices, and which backend serves each op and why the others do not.", (),
    ),
}
# fmt: on

CODES = "Exit codes: 0 success, 1 a check or the work failed, 2 user error, 130 interrupted."


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``command`` holds the name of the command. SystemExit for --help and for errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="layerskip", description="Early exit and self-speculative decoding.", epilog=CODES)
    version = f"layerskip-kernels {importlib.metadata.version('layerskip-kernels')}"
    parser.add_argument("--version", action="version", version=version, help="show it and exit")
    _ends.declare(parser)
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        parser.error(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands = {}
    for name, command in COMMANDS.items():
        commands[name] = subparsers.add_parser(name, help=command.summary, description=command.description)
        for one in command.options:
            if isinstance(one, Exclusive):
                group = commands[name].add_mutually_exclusive_group(required=one.required)
                for names, settings in one.options:
                    group.add_argument(*names, **settings)
            else:
                commands[name].add_argument(*one.names, **one.settings)
        _ends.declare(commands[name], default=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(words)
    if rest:
        commands[args.command].refuse(rest[0])
    return args


def validate_names(args: argparse.Namespace) -> None:
    """Raise for names of models, tasks and files that do not exist, before torch is imported."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.command == "demo":
        registry.check(registry.DEMOS, args.name)
    if "recipe" in given:
        _check_file("recipe", args.recipe)
    for path in given.get("files", ()):
        _check_file("measurements", path)
    if "prompts" in given:
        check_prompts(args.prompts)
    if "model" in given:
        registry.check_model(args.model)
    if isinstance(given.get("draft_head"), str):
        _check_part("draft head", args.draft_head, ("full", "int8"))
    if "exit" in given:
        _check_part("exit", args.exit, (NO_EXIT,))


def is_main_process() -> bool:
    """Whether this is the only process, or the one that prints and writes under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def check_device_of_process(name: str) -> None:
    """Raise ValueError if ``--device`` names one GPU for several processes."""
    if ":" in name and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"--device {name} is one GPU, under torchrun every process has its own; leave it out")


def check_tasks(names: Iterable[str]) -> None:
    """Raise for a source of training texts that is neither a task, nor a file, nor on the hub."""
    for name in names:
        if not name.startswith(data.PREFIX) and not Path(name).is_file():
            registry.check(registry.TASKS, name)


def _check_file(what: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}{registry.similar_file(path)}")


def _check_part(what: str, name: str, choices: Sequence[str] = ()) -> None:
    """Raise for a draft head or an exit that is none of ``choices``, of no provided model, and not on the disk."""
    known = [*choices, *registry.names(registry.MODELS)]
    if name in known or Path(name).expanduser().exists():
        return
    if name in registry.EXAMPLE[registry.MODELS]:
        raise registry.unknown(registry.MODELS, name)
    hint = registry.similar_file(Path(name)) or ("" if "/" in name else f"; {nearest(name, known)}")
    raise FileNotFoundError(f"no {what} at {name}{hint}")
