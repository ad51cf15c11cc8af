"""Show how good every layer's exit is on a model's own text, and what n-grams find: agreement, and calibration."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from torch import Tensor

from .._files import check_output, write_atomically
from ..decoding import SelfSpeculativeDecoder
from ..models import Exit, LayerSkipModel
from . import arguments, options, rendering
from .rendering import table

if TYPE_CHECKING:
    from ..training.exit_analysis import ExitAnalysis


@dataclass(frozen=True)
class Row:
    """One draft source: how often it has the full depth's token, and a bound on its speedup.

    Lookup drafts have no confidence.
    """

    label: str
    agreement: float
    confidence: float | None
    error: float | None
    tokens_per_round: float
    bound: float


def run(args: argparse.Namespace, console: Console) -> int:
    """Let the model write, run every exit on the text, print and write the results."""
    from ..training.exit_analysis import analyze_exits

    data, image = (args.output.with_name(f"{args.output.name}.{ending}") for ending in ("json", "png"))
    for output in (data, image):
        check_output(output, args.overwrite, (args.prompts,))
    trained = None if args.exit is None else Exit.load(args.exit)
    texts = [prompt.text for prompt in arguments.read_prompts(args.prompts, args.limit)]
    model, tokenizer = options.load(args, Console(stderr=True))
    decoder = SelfSpeculativeDecoder(model, exit=trained)
    written = []
    with console.status("writing continuations"):
        for text in texts:
            ids = options.encode(tokenizer, text, args.device)
            out = decoder.generate(ids, max_new_tokens=args.max_new_tokens, strategy="autoregressive")
            written.append((out.sequences[0], ids.shape[1]))
    with console.status("running every exit"):
        analysis = analyze_exits(model, written)
        rows = of_layers(analysis, args.num_speculations)
        if trained is not None:
            rows.append(of_trained(decoder.model, written, args.num_speculations))
        rows.append(of_ngrams(written))
    title = f"{args.model} in {options.weights_of(model)}, {args.prompts}: {analysis.tokens.shape[1]} tokens"
    _print(console, title, rows, args.num_speculations)
    settings = {
        **options.settings(args, decoder.model),
        "exit": args.exit,
        "prompts": args.prompts,
        "positions": analysis.tokens.shape[1],
        "num_speculations": args.num_speculations,
    }
    content = {
        "settings": settings,
        "machine": options.facts(args.device),
        "exits": [dataclasses.asdict(row) for row in rows],
        "reliability": {str(exit_layer): _bins(analysis, exit_layer) for exit_layer in _some_exits(analysis)},
    }
    write_atomically(data, json.dumps(content, indent=1).encode())
    with rendering.panels(3, size=(15, 4)) as panels:
        axes = [axes for _, _, axes in rendering.of_exits(content, panels)]
        write_atomically(image, rendering.saved(axes[0]))
    console.print(f"wrote {data} and {image}")
    return 0


def of_layers(analysis: ExitAnalysis, num_speculations: int) -> list[Row]:
    """The model's own exits, without the full depth."""
    rows = list(zip(analysis.agreement(), analysis.mean_confidence(), strict=True))[:-1]
    return [
        Row(
            f"{exit_layer}",
            *row,
            analysis.calibration_error(exit_layer),
            analysis.tokens_per_round(exit_layer, num_speculations),
            analysis.speedup_bound(exit_layer, num_speculations),
        )
        for exit_layer, row in enumerate(rows, start=1)
    ]


def of_trained(model: LayerSkipModel, written: Sequence[tuple[Tensor, int]], num_speculations: int) -> Row:
    """The trained exit of a model."""
    from ..training.exit_analysis import analyze_trained_exit, speedup_bound

    analysis, added, exit_layer = analyze_trained_exit(model, written), model.decoder.num_draft_layers, model.exit_layer
    assert exit_layer is not None  # else `analyze_trained_exit` raises
    emitted = analysis.tokens_per_round(1, num_speculations)
    return Row(
        f"{exit_layer} + {added} draft layer{'' if added == 1 else 's'}",
        analysis.agreement()[0],
        analysis.mean_confidence()[0],
        analysis.calibration_error(1),
        emitted,
        speedup_bound(emitted, exit_layer, added, model.num_layers, num_speculations),
    )


def of_ngrams(written: Sequence[tuple[Tensor, int]]) -> Row:
    """Prompt lookup: a round is one pass, however many tokens it drafts."""
    from ..training.exit_analysis import analyze_lookup

    analysis = analyze_lookup(written)
    agreement = analysis.right / analysis.positions
    return Row("n-grams", agreement, None, None, analysis.tokens_per_round, analysis.tokens_per_round)


def _print(console: Console, title: str, rows: Sequence[Row], num_speculations: int) -> None:
    """Print one line per exit and one for n-grams; the best bound on the speedup is bold."""
    best = max(rows, key=lambda row: row.bound)
    columns = (
        "exit layer", "agreement", "confidence", "calibration error", f"tokens a round, K={num_speculations}",
        "speedup at most",
    )  # fmt: skip
    shown = table(title, columns, (), unwrapped=columns[:1], justify="right")
    for row in rows:
        cells = (
            row.label,
            f"{row.agreement:.1%}",
            "–" if row.confidence is None else f"{row.confidence:.1%}",
            "–" if row.error is None else f"{row.error:.3f}",
            f"{row.tokens_per_round:.2f}",
            f"{row.bound:.2f}×",
        )
        shown.add_row(*cells, style="bold" if row is best else None)
    console.print(shown)


def _bins(analysis: ExitAnalysis, exit_layer: int) -> list[dict[str, float]]:
    """The bins of a reliability diagram; an empty bin has no mean and is left out."""
    columns = (part.tolist() for part in analysis.reliability(exit_layer))
    keys = ("positions", "confidence", "agreement")
    return [dict(zip(keys, one, strict=True)) for one in zip(*columns, strict=True) if one[0]]


def _some_exits(analysis: ExitAnalysis) -> list[int]:
    layers = analysis.tokens.shape[0]
    return sorted({max(1, layers * part // 8) for part in (1, 2, 4, 6)})
