"""Show how good every layer's exit is on a model's own text, and what n-grams find: agreement, and calibration."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from .._files import check_output, write_atomically
from ..decoding import SelfSpeculativeDecoder
from ..models import Exit, LayerSkipModel
from . import arguments, options, plots

if TYPE_CHECKING:
    from ..training.exit_analysis import ExitSurvey


@dataclass(frozen=True)
class Surveyed:
    """One source of drafts: what it is, how often it has the full depth's token, and how much speed it could give.

    What was looked up has no confidence.
    """

    label: str
    agreement: float
    confidence: float | None
    error: float | None
    tokens_per_round: float
    bound: float


def run(args: argparse.Namespace, console: Console) -> int:
    """Let the model write, ask every exit about it, show the answers."""
    from ..training.exit_analysis import survey_exits

    data, path = (args.output.with_name(f"{args.output.name}.{ending}") for ending in ("json", "png"))
    for output in (data, path):
        check_output(output, overwrite=True)
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
    with console.status("asking every exit"):
        survey = survey_exits(model, written)
        rows = of_layers(survey, args.num_speculations)
        if trained is not None:
            rows.append(of_trained(decoder.model, written, args.num_speculations))
        rows.append(of_ngrams(written))
    title = f"{args.model} in {options.weights_of(model)}, {args.prompts}: {survey.tokens.shape[1]} tokens"
    console.print(table(rows, args.num_speculations, title))
    found = content(args, decoder, survey, rows)
    write_atomically(data, json.dumps(found, indent=1).encode())
    with plots.panels(3, size=(15, 4)) as panels:
        drawn = [axes for _, _, axes in plots.of_exits(found, panels)]
        write_atomically(path, plots.saved(drawn[0]))
    console.print(f"wrote {data} and {path}")
    return 0


def content(
    args: argparse.Namespace, decoder: SelfSpeculativeDecoder, survey: ExitSurvey, rows: Sequence[Surveyed]
) -> dict[str, Any]:
    """What the JSON has: the rows of the table, and agreement by confidence of the exits that the picture shows."""
    settings = {
        **options.settings(args, decoder.model),
        "exit": args.exit,
        "prompts": args.prompts,
        "positions": survey.tokens.shape[1],
        "num_speculations": args.num_speculations,
    }
    reliability = {
        str(exit_layer): [
            dict(zip(("positions", "confidence", "agreement"), one, strict=True))
            for one in zip(*(part.tolist() for part in survey.reliability(exit_layer)), strict=True)
            if one[0]  # an empty bin has no mean
        ]
        for exit_layer in _some_exits(survey)
    }
    exits = [dataclasses.asdict(row) for row in rows]
    return {"settings": settings, "machine": options.facts(args.device), "exits": exits, "reliability": reliability}


def of_layers(survey: ExitSurvey, drafts: int) -> list[Surveyed]:
    """The model's own exits, but for the full depth, which is no draft."""
    rows = zip(survey.agreement(), survey.mean_confidence(), strict=True)
    return [
        Surveyed(
            f"{exit_layer}",
            *row,
            survey.calibration_error(exit_layer),
            survey.tokens_per_round(exit_layer, drafts),
            survey.speedup_bound(exit_layer, drafts),
        )
        for exit_layer, row in enumerate(list(rows)[:-1], start=1)
    ]


def of_trained(model: LayerSkipModel, written: Sequence[tuple[Tensor, int]], drafts: int) -> Surveyed:
    """The exit with which a model drafts."""
    from ..training.exit_analysis import speedup_bound, survey_trained_exit

    survey = survey_trained_exit(model, written)
    draft_layers, exit_layer = model.decoder.num_draft_layers, model.exit_layer
    assert exit_layer is not None  # else there were no survey
    emitted = survey.tokens_per_round(1, drafts)
    return Surveyed(
        f"{exit_layer} + {draft_layers} draft layer{'' if draft_layers == 1 else 's'}",
        survey.agreement()[0],
        survey.mean_confidence()[0],
        survey.calibration_error(1),
        emitted,
        speedup_bound(emitted, exit_layer, draft_layers, model.num_layers, drafts),
    )


def of_ngrams(written: Sequence[tuple[Tensor, int]]) -> Surveyed:
    """Text that occurred before: a round is one pass, however many tokens it drafts."""
    from ..training.exit_analysis import survey_ngrams

    survey = survey_ngrams(written)
    agreement = survey.right / survey.positions
    return Surveyed("n-grams", agreement, None, None, survey.tokens_per_round, survey.tokens_per_round)


def table(rows: Sequence[Surveyed], drafts: int, title: str) -> Table:
    """One line an exit, and one for n-grams; the best bound on the speedup is marked."""
    best = max(rows, key=lambda row: row.bound)
    shown = Table(title=title, title_justify="left")
    columns = (
        "exit layer",
        "agreement",
        "confidence",
        "calibration error",
        f"tokens a round, K={drafts}",
        "speedup at most",
    )
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=column == "exit layer")
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
    return shown


def _some_exits(survey: ExitSurvey) -> list[int]:
    layers = survey.tokens.shape[0]
    return sorted({max(1, layers * part // 8) for part in (1, 2, 4, 6)})
