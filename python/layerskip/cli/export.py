"""Write a model for other engines: its first layers as an ordinary draft model, or all of it for vLLM's plugin."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import registry
from .._files import replaced, reserved
from ..decoding.draft_model import FILE_NAME
from ..decoding.tuning import CONFIG_KEY
from ..models import LayerSkipModel, exit
from . import options


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the directory atomically."""
    with reserved(args.output, args.overwrite, (args.model, args.exit), directory=True):
        return _export(args, console)


def _export(args: argparse.Namespace, console: Console) -> int:
    model, tokenizer = options.load(args, Console(stderr=True))
    if isinstance(model, LayerSkipModel):
        raise ValueError(
            f"layerskip export takes plain weights; {args.model} has {model.weights}: give the model it was made from"
        )
    layers = model.config.num_hidden_layers
    trained = _exit(args, model.config)
    if args.whole:
        drafts = {"exit_layer": args.exit_layer} if trained is None else {"exit": exit.FILE_NAME}
        setattr(model.config, CONFIG_KEY, {**drafts, "num_speculations": args.num_speculations})
    written = model if args.whole else first_layers(model, args.exit_layer)
    with replaced(args.output) as (directory,):
        written.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        beside = _write_beside(args.model, trained, directory) if args.whole else None
    size = sum(path.stat().st_size for path in args.output.iterdir())
    console.print(
        f"wrote {written.config.num_hidden_layers} of {layers} layers to {args.output}, {size / 1e6:.0f} MB"
        + (f", with {beside}" if beside is not None else ""),
        soft_wrap=True,
    )
    return 0


def _exit(args: argparse.Namespace, config: Any) -> exit.Exit | None:
    """Load and check ``--exit``, or check ``--exit-layer``."""
    if args.exit is None:
        if args.exit_layer >= config.num_hidden_layers:
            raise ValueError(f"--exit-layer must be in 1 … {config.num_hidden_layers - 1}, got {args.exit_layer}")
        return None
    if not args.whole:
        raise ValueError("--exit needs --whole: only vLLM's plugin runs an exit's own layers, no other engine does")
    trained = exit.Exit.load(args.exit)
    trained.check_sizes(config.num_hidden_layers, config.vocab_size, config.hidden_size)
    return trained


def first_layers(model: Any, exit_layer: int) -> Any:
    """A model of layers [0, exit_layer), the final norm and the head, of the same class and sharing the weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = exit_layer
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:exit_layer]
    with torch.device("meta"):
        shallow = type(model)(config)
    weights = model.state_dict()
    shallow.load_state_dict({name: weights[name] for name in shallow.state_dict()}, assign=True)
    shallow.tie_weights()
    shallow.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state dict
    theirs = dict(model.named_buffers())
    for name in [name for name, buffer in shallow.named_buffers() if buffer.is_meta]:  # nor is Gemma's factor
        owner, _, own = name.rpartition(".")
        setattr(shallow.get_submodule(owner), own, theirs[name])
    shallow.generation_config = copy.deepcopy(model.generation_config)
    return shallow.eval()


def _write_beside(model: str, trained: exit.Exit | None, directory: Path) -> str | None:
    """Write the exit, or else the model's draft head, beside a whole model; return the file's name."""
    head = _draft_head(model)
    if trained is not None:
        path = trained.save(directory)
    elif head is not None:
        path = Path(shutil.copyfile(head, directory / FILE_NAME))
    else:
        return None
    _write_index(directory)
    return path.name


def _write_index(directory: Path) -> None:
    """Index the weights: without an index some readers, vLLM among them, also read the draft head's file as weights."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if not index.exists():  # transformers writes one where there are several files
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            content = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "model.safetensors")}
        index.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _draft_head(model: str) -> Path | None:
    """The draft head of a model: of the package that provides it, or in its directory."""
    provider = registry.find(registry.MODELS, model)
    if provider is not None:
        head: Path | None = provider.draft_head(model)
        return head
    beside = Path(model).expanduser() / FILE_NAME
    return beside if beside.is_file() else None
