"""Show how good every layer's exit is on a model's own text: agreement with the full depth, and calibration."""

from __future__ import annotations

import argparse
import io
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .._files import check_output, write_atomically
from ..decoding import SelfSpeculativeDecoder
from . import options, prompts

if TYPE_CHECKING:
    from ..training.survey import ExitSurvey


def run(args: argparse.Namespace, console: Console) -> int:
    """Let the model write, ask every exit about it, show the answers."""
    from ..training.survey import survey_exits

    path = args.output.with_name(f"{args.output.name}.png")
    check_output(path, overwrite=True)
    texts = [prompt.text for prompt in prompts.read(args.prompts, args.limit)]
    model, tokenizer = options.load(args, Console(stderr=True))
    decoder = SelfSpeculativeDecoder(model, 1)
    written = []
    with console.status("writing continuations"):
        for text in texts:
            ids = options.encode(tokenizer, text, args.device)
            out = decoder.generate(ids, max_new_tokens=args.max_new_tokens, strategy="autoregressive")
            written.append((out.sequences[0], ids.shape[1]))
    with console.status("asking every exit"):
        survey = survey_exits(model, written)
    console.print(table(survey, args.num_speculations, f"{args.model}, {args.prompts}"))
    write_atomically(path, picture(survey))
    console.print(f"wrote {path}")
    return 0


def table(survey: ExitSurvey, drafts: int, title: str) -> Table:
    """One line a layer; the best bound on the speedup is marked."""
    bounds = [survey.speedup_bound(exit_layer, drafts) for exit_layer in range(1, survey.tokens.shape[0])]
    best = max(range(len(bounds)), key=bounds.__getitem__) + 1
    shown = Table(title=f"{title}: {survey.tokens.shape[1]} tokens", title_justify="left")
    columns = (
        "exit layer",
        "agreement",
        "confidence",
        "calibration error",
        f"tokens a round, K={drafts}",
        "speedup at most",
    )
    for column in columns:
        shown.add_column(column, justify="right")
    rows = zip(survey.agreement(), survey.mean_confidence(), bounds, strict=False)  # the full depth is no draft
    for exit_layer, (agreement, confidence, bound) in enumerate(rows, start=1):
        error, emitted = survey.calibration_error(exit_layer), survey.tokens_per_round(exit_layer, drafts)
        cells = (
            f"{exit_layer}",
            f"{agreement:.1%}",
            f"{confidence:.1%}",
            f"{error:.3f}",
            f"{emitted:.2f}",
            f"{bound:.2f}×",
        )
        shown.add_row(*cells, style="bold" if exit_layer == best else None)
    return shown


def picture(survey: ExitSurvey) -> bytes:
    """A PNG: agreement by layer on the left, agreement by confidence of some exits on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    depth, calibration = figure.subplots(1, 2)
    layers = range(1, survey.tokens.shape[0] + 1)
    depth.plot(layers, survey.agreement(), label="agreement with the full depth")
    depth.plot(layers, survey.mean_confidence(), label="mean confidence", linestyle="--")
    depth.set(xlabel="exit layer", ylim=(0, 1.02))
    depth.legend()
    _reliability(calibration, survey)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _reliability(axes: Any, survey: ExitSurvey) -> None:
    layers = survey.tokens.shape[0]
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for exit_layer in sorted({max(1, layers * part // 8) for part in (1, 2, 4, 6)}):
        _, confidence, agreement = survey.reliability(exit_layer)
        axes.plot(confidence.tolist(), agreement.tolist(), marker="o", label=f"exit layer {exit_layer}")
    axes.set(xlabel="confidence of the exit", ylabel="agreement with the full depth", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
