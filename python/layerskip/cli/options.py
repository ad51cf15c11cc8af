"""Load models and build decoders from command-line arguments; progress, journals and facts about the machine."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

import layerskip_kernels

from .. import devices, models
from .._files import Journal
from ..decoding import DraftHead, SamplingParams, SelfSpeculativeDecoder
from ..decoding.tuning import tuned
from ..models import LayerSkipModel
from . import arguments

MAX_SEQ_LEN = 4096  # by default: each slot of the KV cache has room for as many tokens


def sampling(args: argparse.Namespace) -> SamplingParams:
    """Sampling parameters; a warning for those that greedy decoding ignores."""
    params = SamplingParams(args.temperature, args.top_k, args.top_p, args.min_p, seed=args.seed)
    used = {"--top-k": args.top_k != 0, "--top-p": args.top_p != 1, "--min-p": args.min_p != 0}
    if params.greedy and any(used.values()):
        names = " and ".join(name for name, given in used.items() if given)
        warnings.warn(f"{names} without --temperature has no effect: decoding is greedy", stacklevel=2)
    return params


def load(
    args: argparse.Namespace, console: Console, dtype: torch.dtype | None = None, *, gather: bool = True
) -> tuple[Any, Any]:
    """Load the model and tokenizer that ``--model`` names onto ``--device``.

    Returns a model of transformers or, with packed weights, a `LayerSkipModel`. Without ``gather`` each weight keeps
    its own memory, which can then be freed separately.
    """
    set_device(args)
    quiet_transformers()
    with console.status(f"loading {args.model}") as status:

        def show(done: int, total: int) -> None:
            status.update(f"loading {args.model}: {done} of {total} weights")

        weights = getattr(args, "weights", None)
        model, tokenizer = models.load(args.model, dtype or getattr(torch, args.dtype), weights, show)
        model = model.to(args.device)
        if gather and args.device.type == "cpu":
            models.gather_weights(model)
        return model, tokenizer


def set_device(args: argparse.Namespace) -> None:
    """Set the number of threads and make ``args.device`` a torch.device; print the GPU that "auto" has picked."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if isinstance(args.device, torch.device):  # already set
        return
    found = devices.find(args.device)
    if args.device == "auto" and found.type == "cuda":
        Console(stderr=True).print(f"computing on {devices.described(found)}", highlight=False, soft_wrap=True)
    args.device = found


def quiet_transformers() -> None:
    """Disable progress bars and logs of transformers, which would run through the output."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # loading reports what is missing
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def draft_head(args: argparse.Namespace) -> str | DraftHead | None:
    """``--draft-head``, loaded if it names one."""
    if args.draft_head in (None, "full", "int8"):
        return args.draft_head
    return DraftHead.load(args.draft_head)


def drafting(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Options of `SelfSpeculativeDecoder`: those given, else of layerskip.json beside the model, else its defaults."""
    names = ("exit_layer", "num_speculations", "draft_threshold", "draft_source", "exit")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given.get("exit") == arguments.NO_EXIT:
        given["exit"] = None
    if args.draft_head is not None:
        given["draft_head"] = draft_head(args)
    return tuned(args.model, model.config, None, given)


def decoder(args: argparse.Namespace, model: Any) -> SelfSpeculativeDecoder:
    return SelfSpeculativeDecoder(model, **drafting(args, model))


def encode(
    tokenizer: Any, text: str, device: torch.device, chat: bool = False, system: str | None = None
) -> torch.Tensor:
    """Token ids [1, N] of a text or, with ``chat``, of a conversation with the text as the user's message."""
    if chat:
        messages = [] if system is None else [{"role": "system", "content": system}]
        text = chat_text(tokenizer, [*messages, {"role": "user", "content": text}])
    return tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids.to(device)


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages in the tokenizer's chat template, up to where the answer begins."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "this model's tokenizer has no chat template; layerskip generate without --chat and --system needs none"
        )
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the messages: {error}") from error
    return text


def max_seq_len(args: argparse.Namespace, decoder: SelfSpeculativeDecoder) -> int:
    """``--max-seq-len``; by default 4096, or what the model has if that is less."""
    given: int | None = args.max_seq_len
    return min(MAX_SEQ_LEN, decoder.max_seq_len) if given is None else given


def progress(*columns: Any, quiet: bool = False) -> Progress:
    """A progress bar on stderr, shown only on a terminal."""
    shown = (*Progress.get_default_columns(), TimeElapsedColumn(), *columns)
    return Progress(*shown, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())


def open_journal(
    args: argparse.Namespace, output: Path, keys: Sequence[str], texts: Sequence[str]
) -> tuple[Journal, dict[str, Any]]:
    """Open the journal OUTPUT.partial of work that depends on the options ``keys`` and on the texts of the prompts."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    work = {key: getattr(args, key) for key in keys}
    work |= {"device": args.device.type, "digest of the prompts": digest}
    return Journal(output.with_name(f"{output.name}.partial"), work, args.overwrite), work


@contextmanager
def journaled(journal: Journal, what: str, total: int, console: Console) -> Iterator[Callable[[Any], None]]:
    """Yield a function that appends a record; an interrupt reports how many of ``total`` there are, and where."""

    def kept() -> str:
        return f"{len(journal.records)} of {total} {what} are in {journal.path}"

    if journal.records:
        console.print(f"{kept()}, the others follow", soft_wrap=True)
    try:
        with progress() as bar:
            task = bar.add_task(what, total=total, completed=len(journal.records))

            def append(record: Any) -> None:
                journal.append(record)
                bar.advance(task)

            yield append
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {kept()}; run the same command again to continue") from None
    finally:
        journal.close()


def weights_of(model: Any) -> str:
    """The dtype of a model's weights, or the formats of packed ones."""
    return model.weights if isinstance(model, LayerSkipModel) else str(model.dtype).removeprefix("torch.")


def settings(args: argparse.Namespace, model: LayerSkipModel) -> dict[str, Any]:
    """The settings of a measurement: model, device and number of threads."""
    return {
        "model": str(args.model),
        "dtype": args.dtype,
        "weights": model.weights,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "layers": model.num_layers,
    }


def facts(device: torch.device) -> dict[str, str]:
    """The machine, the versions and the time of a measurement."""
    return {
        "processor": processor(),
        "instruction set": instructions(),
        "device": devices.described(device),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("layerskip-kernels", "torch", "transformers", "triton")},
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version(package: str) -> str:
    """The version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def instructions() -> str:
    """The instruction set of the native kernels, or why there are none."""
    try:
        return layerskip_kernels.cpu_isa()
    except RuntimeError as error:
        return str(error)


def processor() -> str:
    """The CPU's name, if Linux or Python knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
