"""Write a model with packed weights, and measure its perplexity before and after."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from .._files import replaced, reserved
from ..models import LayerSkipModel, adapt, save
from . import options
from .arguments import FORMATS, NATIVE

WINDOW = 512
CALIBRATION = (8, 256)
"""Number of pieces of the calibration text, and tokens of each."""
_LONG = 2000  # characters of the shortest topic of the manual to use


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the directory atomically."""
    with reserved(args.output, args.overwrite, (args.model, args.text, args.calibration), directory=True):
        return _quantize(args, console)


def _quantize(args: argparse.Namespace, console: Console) -> int:
    native = args.weights == NATIVE  # no plain model to measure, and nothing to round
    if native and args.calibration is not None:
        raise ValueError("--calibration is for weights that are rounded; leave it out with --weights native")
    texts = long_texts(args.text) if args.windows > 0 and not native else []
    model, tokenizer, measured = _packed(args, texts, console)
    with replaced(args.output) as (directory,):
        save(model, directory, tokenizer)
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    console.print(
        f"wrote {args.output}: {model.weights}, {size / 1e6:.0f} MB of weights", highlight=False, soft_wrap=True
    )
    if measured is not None:
        before, after = measured
        source = args.text or "Python's manual"
        console.print(
            f"perplexity {before:.3f} before, {after:.3f} after ({after / before - 1:+.2%}), "
            f"on up to {args.windows} windows of {WINDOW} tokens of {source}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return 0


def _packed(
    args: argparse.Namespace, texts: list[str], console: Console
) -> tuple[LayerSkipModel, Any, tuple[float, float] | None]:
    """Pack the model; return it, its tokenizer and, with texts, the perplexity before and after."""
    errors = Console(stderr=True)
    plain = argparse.Namespace(**vars(args))
    plain.weights = None if texts or args.calibration else args.weights
    model, tokenizer = options.load(plain, errors, gather=False)
    if plain.weights is not None:
        if not isinstance(model, LayerSkipModel):
            raise ValueError(f"{args.model} has plain weights; give --weights one of {', '.join(FORMATS)}")
        return model, tokenizer, None
    if isinstance(model, LayerSkipModel):
        raise ValueError(f"the weights of {args.model} are packed already, in {model.weights}")
    calibration = [] if args.calibration is None else _calibration(args.calibration, tokenizer, plain.device)
    before = _perplexity(model, tokenizer, texts, args.windows, errors)
    with options.progress() as progress:
        task = progress.add_task(f"packing in {args.weights}")
        packed = adapt(model).quantize(
            args.weights,
            release=True,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            calibration=calibration,
        )
    after = _perplexity(packed, tokenizer, texts, args.windows, errors)
    return packed, tokenizer, None if before is None or after is None else (before, after)


def _perplexity(model: Any, tokenizer: Any, texts: list[str], windows: int, errors: Console) -> float | None:
    from ..training.exit_analysis import perplexity

    with errors.status("measuring the perplexity"):
        return perplexity(model, tokenizer, texts, WINDOW, windows) if texts else None


def _calibration(path: Path, tokenizer: Any, device: Any) -> list[Any]:
    """The first token ids of a text, split into pieces."""
    count, size = CALIBRATION
    ids = options.encode(tokenizer, path.read_text(encoding="utf-8"), device)[0, : count * size]
    if not len(ids):
        raise ValueError(f"{path} holds no text to calibrate with")
    return list(ids.split(size))


def long_texts(path: Path | None) -> list[str]:
    """The text of the file, or of Python's manual."""
    if path is not None:
        return [path.read_text(encoding="utf-8")]
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics) if len(topics[name]) > _LONG]
