"""The result of a benchmark: as a table, as JSON, as a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import write_atomically
from ..decoding.source import EXIT
from .drafts import Drafts
from .sweep import Sweep, sweep_table
from .throughput import BatchSpeed, throughput_table
from .told import Told
from .ways import AUTOREGRESSIVE, EARLY_EXIT_ASSISTED, SELF_SPECULATIVE, TRANSFORMERS

__all__ = ["AUTOREGRESSIVE", "EARLY_EXIT_ASSISTED", "SELF_SPECULATIVE", "TRANSFORMERS", "Report", "Run", "Skipped"]


@dataclass
class Run:
    """One prompt, one way.

    ``tokens`` in ``seconds`` leave out the first token, whose time is ``first_token``. Where it does not come alone,
    they leave out all ``first_tokens`` of its group. ``drafts`` are the drafted and accepted tokens by source, ``told``
    is what each round drafted, in texts.
    """

    prompt: int
    tokens: int
    seconds: float
    first_token: float
    first_tokens: int = 1
    bytes_per_token: float = 0.0
    drafted: int = 0
    accepted: int = 0
    drafts: Drafts = field(default_factory=Drafts)
    sequence: list[int] = field(default_factory=list)
    told: Told = field(default_factory=Told)

    @property
    def rate(self) -> float:
        """Tokens per second, after the first token."""
        return self.tokens / self.seconds


def _if_known(form: str, key: str) -> Callable[[str, dict[str, float]], str]:
    """A cell that stays empty where the bytes per token are not known, as for transformers."""
    return lambda name, values: form.format(values[key]) if values["megabytes_per_token"] else ""


_ROWS: dict[str, Callable[[str, dict[str, float]], str]] = {
    "tokens/s": lambda name, values: f"{values['tokens_per_second']:.1f}",
    "first token": lambda name, values: f"{values['milliseconds_to_first_token']:.0f} ms",
    "drafts accepted": lambda name, values: f"{values['acceptance_rate']:.0%}" if name == SELF_SPECULATIVE else "",
    "speedup, of means": lambda name, values: f"{values['speedup_of_means']:.2f}×",
    "mean speedup": lambda name, values: f"{values['mean_speedup']:.2f}×",
    "MB/token": _if_known("{:.0f}", "megabytes_per_token"),
    "GB/s": _if_known("{:.1f}", "gigabytes_per_second"),
    "of read speed": _if_known("{:.0%}", "fraction_of_bandwidth"),
}


def outputs(stem: Path) -> list[Path]:
    """What `Report.write` writes."""
    return [stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".png")]


def kind(settings: dict[str, Any]) -> str:
    """The dtype, and the format of packed weights."""
    dtype, weights = settings["dtype"], settings.get("weights", settings["dtype"])
    return str(dtype if weights == dtype else f"{weights} in {dtype}")


def where(settings: dict[str, Any]) -> str:
    """What computed: the CPU's threads, or a card."""
    return f"{settings['threads']} threads" if settings["device"] == "cpu" else settings["device"]


@dataclass
class Skipped:
    """A prompt that can't be measured, and why."""

    prompt: int
    reason: str


@dataclass
class Report:
    """All runs, by the way of decoding, with what they are compared to.

    ``tasks`` are those of all prompts, ``skipped`` the prompts that were not run. ``bandwidth`` is the memory's read
    speed in GB/s as measured in the same run; ``throughput`` and ``sweep`` are what modules of these names measured.
    ``prompts`` are their texts, ``machine`` is what `machine.facts` says.
    """

    settings: dict[str, Any]
    tasks: list[str]
    runs: dict[str, list[Run]]
    skipped: list[Skipped] = field(default_factory=list)
    bandwidth: float = 0.0
    throughput: list[BatchSpeed] = field(default_factory=list)
    sweep: list[Sweep] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether self-speculative decoding gave the autoregressive tokens in every run, alone and in batches."""
        pairs = zip(self.runs[AUTOREGRESSIVE], self.runs[SELF_SPECULATIVE], strict=True)
        same = all(plain.sequence == speculative.sequence for plain, speculative in pairs)
        return same and all(batch.identical for batch in self.throughput)

    def summary(self, name: str, prompts: set[int] | None = None) -> dict[str, float] | None:
        """Medians of one way, and its speedup over our autoregressive decoding by both common definitions.

        None where no run gave a token after its first ones, so that there is no speed; see `no_speed`.

        ``speedup_of_means`` is the ratio of the mean tokens/s; ``mean_speedup`` is the mean, over runs, of the ratio of
        the times per token.
        """
        chosen = [
            (run, base)
            for run, base in zip(self.runs[name], self.runs[AUTOREGRESSIVE], strict=True)
            if (prompts is None or run.prompt in prompts) and run.tokens and base.tokens
        ]
        if not chosen:
            return None
        runs, bases = [run for run, _ in chosen], [base for _, base in chosen]
        drafted = sum(run.drafted for run in runs)
        rate, size = median(run.rate for run in runs), median(run.bytes_per_token for run in runs)
        achieved = median(run.rate * run.bytes_per_token for run in runs) / 1e9
        return {
            "tokens_per_second": rate,
            "milliseconds_per_token": 1e3 / rate,
            "milliseconds_to_first_token": 1e3 * median(run.first_token for run in runs),
            "acceptance_rate": sum(run.accepted for run in runs) / drafted if drafted else 0.0,
            "speedup_of_means": mean(run.rate for run in runs) / mean(base.rate for base in bases),
            "mean_speedup": mean(run.rate / base.rate for run, base in chosen),
            "megabytes_per_token": size / 1e6,
            "gigabytes_per_second": achieved,
            "fraction_of_bandwidth": achieved / self.bandwidth,
        }

    def no_speed(self, name: str) -> str:
        """Why a way has no summary."""
        at_once = [run.first_tokens for run in self.runs[name] if run.first_tokens > 1]
        if not at_once:
            return f"{name}: every run ended at its first token, so there is no speed after it; take other prompts"
        return (
            f"{name}: every run gave all its tokens at once (up to {max(at_once)}), so there is no speed after the "
            "first; take more --max-new-tokens"
        )

    def by_task(self) -> dict[str, dict[str, dict[str, float] | None]]:
        """Summaries for each kind of prompt."""
        members = {task: {index for index, other in enumerate(self.tasks) if other == task} for task in self.tasks}
        return {task: {name: self.summary(name, chosen) for name in self.runs} for task, chosen in members.items()}

    def show(self, console: Console) -> None:
        """Print the table and what goes with it."""
        setting = self.settings
        title = f"{setting['model']}, {kind(setting)}, {where(setting)}, "
        title += f"E={setting['exit_layer']} of {setting['layers']}, K={setting['num_speculations']}"
        if setting["draft_source"] != EXIT:
            title += f", drafts from {setting['draft_source']}"
        if setting["draft_threshold"]:
            title += f", threshold {setting['draft_threshold']:g}"
        console.print(self._table(title))
        console.print(self._sources(), highlight=False)
        console.print(
            "Medians, after the first token. Speedups are over our autoregressive decoding: "
            "the ratio of the mean tokens/s, and the mean ratio of the times per token.",
            style="dim",
        )
        for name in self.runs:
            if self.summary(name) is None:
                console.print(self.no_speed(name), style="yellow", highlight=False)
        if self.skipped:
            console.print(f"{len(self.skipped)} of {len(self.tasks)} prompts were skipped", style="yellow")
        console.print(f"this machine reads {self.bandwidth:.1f} GB/s (measured in the same run)", highlight=False)
        if self.throughput:
            console.print(throughput_table(self.throughput))
        if self.sweep:
            console.print(sweep_table(self.sweep))
        if self.identical:
            console.print("[green]✓[/green] self-speculative and autoregressive tokens are identical")
        else:
            console.print("[red]✗ self-speculative tokens differ from the autoregressive ones: no speedup counts[/red]")

    def _table(self, title: str) -> Table:
        table = Table("", *self.runs, title=title, title_justify="left")
        columns = [(name, self.summary(name)) for name in self.runs]
        for label, cell in _ROWS.items():
            table.add_row(label, *("" if values is None else cell(name, values) for name, values in columns))
        return table

    def _sources(self) -> str:
        """How many drafts of each source were accepted."""
        total = Drafts.sum(run.drafts for run in self.runs[SELF_SPECULATIVE])
        return f"drafts accepted, by source (and place in the round): {str(total) or 'nothing was drafted'}"

    def write(self, stem: Path, complete: bool = True) -> list[Path]:
        """Write ``<stem>.json`` and, of a measurement that is ``complete``, ``<stem>.png``, if there is a speed."""
        content = {
            "complete": complete,
            "settings": self.settings,
            "machine": self.machine,
            "read_gigabytes_per_second": self.bandwidth,
            "identical": self.identical,
            "summary": {name: self.summary(name) for name in self.runs},
            "by_task": self.by_task(),
            "throughput": [dataclasses.asdict(batch) for batch in self.throughput],
            "sweep": [dataclasses.asdict(task) for task in self.sweep],
            "prompts": [{"task": task, "text": text} for task, text in zip(self.tasks, self.prompts, strict=False)],
            "skipped": [dataclasses.asdict(prompt) for prompt in self.skipped],
            "runs": {name: [dataclasses.asdict(run) for run in runs] for name, runs in self.runs.items()},
        }
        data, picture = outputs(stem)
        write_atomically(data, json.dumps(content, indent=1).encode())
        speeds = {name: values for name in self.runs if (values := self.summary(name)) is not None}
        if not complete or AUTOREGRESSIVE not in speeds:
            return [data]
        write_atomically(picture, self._picture(speeds))
        return [data, picture]

    def _picture(self, speeds: dict[str, dict[str, float]]) -> bytes:
        from matplotlib.figure import Figure

        names = list(speeds)
        rates = [values["tokens_per_second"] for values in speeds.values()]
        roofline = self.bandwidth * 1e3 / speeds[AUTOREGRESSIVE]["megabytes_per_token"]
        figure = Figure(figsize=(8, 1.2 + 0.6 * len(names)), layout="constrained")
        axes = figure.subplots()
        colours = ["#4c78a8", "#54a24b", "#bab0ac", "#9d9590"][: len(names)]
        axes.bar_label(axes.barh(names, rates, color=colours), fmt="%.1f", padding=3)
        axes.axvline(roofline, linestyle="--", color="#e45756", label=f"autoregressive at {self.bandwidth:.0f} GB/s")
        axes.invert_yaxis()
        axes.set_xlabel("tokens per second, after the first (median)")
        axes.margins(x=0.15)
        axes.legend(loc="lower right")
        axes.set_title(f"{self.settings['model']}, {kind(self.settings)}, {where(self.settings)}")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()
