"""Turn command-line options into models, decoders and sampling parameters."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import layerskip_kernels

from .. import devices, models
from ..decoding import DraftHead, SamplingParams, SelfSpeculativeDecoder
from ..models import LayerSkipModel


def sampling(args: argparse.Namespace) -> SamplingParams:
    """What the options say."""
    return SamplingParams(args.temperature, args.top_k, args.top_p, args.min_p, seed=args.seed)


def load(
    args: argparse.Namespace, console: Console, dtype: torch.dtype | None = None, *, gather: bool = True
) -> tuple[Any, Any]:
    """The model and tokenizer that the options name, on the device that they name.

    Of transformers or, with packed weights, a `LayerSkipModel`. Without ``gather`` each weight keeps memory of its own,
    which can be freed by itself.
    """
    settle(args)
    quiet_transformers()
    with console.status(f"loading {args.model}") as status:

        def tell(done: int, total: int) -> None:
            status.update(f"loading {args.model}: {done} of {total} weights")

        weights = getattr(args, "weights", None)
        model, tokenizer = models.load(args.model, dtype or getattr(torch, args.dtype), weights, tell)
        model = model.to(args.device)
        if gather and args.device.type == "cpu":
            models.gather_weights(model)
        return model, tokenizer


def load_plain(args: argparse.Namespace, console: Console, what: str) -> tuple[Any, Any]:
    """As `load`, for what only a model of transformers can do."""
    model, tokenizer = load(args, console)
    if isinstance(model, LayerSkipModel):
        raise ValueError(
            f"{what} takes plain weights; {args.model} has {model.weights}: give the model it was made from"
        )
    return model, tokenizer


def weights_of(model: Any) -> str:
    """What a report says of the weights: a dtype, or the formats of packed ones."""
    return model.weights if isinstance(model, LayerSkipModel) else str(model.dtype).removeprefix("torch.")


def settle(args: argparse.Namespace) -> None:
    """Set the threads, and make a device of ``--device``; a card that "auto" has picked is told on stderr."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if isinstance(args.device, torch.device):  # it was settled before
        return
    found = devices.find(args.device)
    if args.device == "auto" and found.type == "cuda":
        Console(stderr=True).print(f"computing on {devices.described(found)}", highlight=False, soft_wrap=True)
    args.device = found


def quiet_transformers() -> None:
    """Its progress bars and log would run through what the commands print."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # loading says what is missing
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def exit_layer(args: argparse.Namespace, model: Any) -> int | str | None:
    """What the options say, or that of the exit that they name, or a quarter of the layers."""
    return args.exit_layer or (None if args.exit else max(1, model.config.num_hidden_layers // 4))


def draft_head(args: argparse.Namespace) -> str | DraftHead | None:
    """What scores the drafts."""
    if args.draft_head in (None, "full", "int8"):
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
        draft_source=args.draft_source,
        exit=args.exit,
    )


def encode(tokenizer: Any, text: str, device: torch.device, chat: bool = False) -> torch.Tensor:
    """Token ids [1, N] of a text, or of a conversation in which the user says it."""
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template; leave out --chat")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids.to(device)


_MEASURED = ("layerskip-kernels", "torch", "transformers", "triton")


def settings(args: argparse.Namespace, model: LayerSkipModel) -> dict[str, Any]:
    """Of the model, and where it ran."""
    return {
        "model": str(args.model),
        "dtype": args.dtype,
        "weights": model.weights,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "layers": model.num_layers,
    }


def facts(device: torch.device) -> dict[str, str]:
    """By name, in words, with the time."""
    return {
        "processor": processor(),
        "instruction set": instructions(),
        "device": devices.described(device),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in _MEASURED},
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version(package: str) -> str:
    """The version of an installed package, or that it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def instructions() -> str:
    """The instruction set that the native kernels use, or why there are none."""
    try:
        return layerskip_kernels.cpu_isa()
    except RuntimeError as error:
        return str(error)


def processor() -> str:
    """Its name, where Linux or Python knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
