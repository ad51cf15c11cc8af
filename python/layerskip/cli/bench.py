"""Benchmark greedy decoding: autoregressive, self-speculative, and transformers, interleaved."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .._files import check_output, reserved, write_atomically
from ..decoding import GenerationOutput, SelfSpeculativeDecoder, Stats, validation
from ..decoding.draft_sources import AUTO, EXIT, NGRAM, max_drafts
from ..devices import ReadBandwidth
from ..models import EarlyExitHead, LayerSkipModel
from . import arguments, options, rendering
from .rendering import AUTOREGRESSIVE, EARLY_EXIT_ASSISTED, SELF_SPECULATIVE, TRANSFORMERS, Drafts, Trace, table

NUM_SPECULATIONS = (1, 2, 4, 8, 12)  # of the sweep
OTHER_SOURCES = (NGRAM, AUTO)  # which the sweep compares with exits
THRESHOLD = 0.5  # which the sweep compares with no threshold, unless --draft-threshold is given


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, and write; return 1 if the self-speculative tokens differ from the autoregressive ones."""
    if args.max_new_tokens < 2:
        raise ValueError("--max-new-tokens must be at least 2: speed is measured after the first token")
    data, picture = outputs(args.output)
    check_output(picture, args.overwrite)
    with reserved(data, args.overwrite, (args.prompts,)):
        return _bench(args, console)


def _bench(args: argparse.Namespace, console: Console) -> int:
    texts = arguments.read_prompts(args.prompts, args.limit)
    model, tokenizer = options.load(args, console)
    args.only_ours |= isinstance(model, LayerSkipModel)  # transformers does not have packed weights
    decoder = options.decoder(args, model)
    decoder.tokenizer = tokenizer
    methods = decoding_methods(model, decoder, args.only_ours)
    settings = options.settings(args, decoder.model)
    drafting = ("exit_layer", "num_speculations", "draft_threshold", "draft_source")
    settings |= {key: getattr(decoder, key) for key in drafting}
    given = ("draft_head", "exit", "prompts", "max_new_tokens", "repeats")
    settings |= {key: getattr(args, key) for key in given}
    report = Report(settings, [prompt.task for prompt in texts], {name: [] for name in methods})
    report.prompts, report.machine = [prompt.text for prompt in texts], options.facts(args.device)
    encoded = _encode(args, console, decoder, tokenizer, report)
    try:
        _measure_all(args, decoder, methods, encoded, report)
        prompts = list(encoded.values())
        for batch in measure_batches(
            decoder, None if args.only_ours else model, prompts, args.batch_sizes, args.max_new_tokens
        ):
            report.throughput.append(batch)
            report.write(args.output, complete=False)
        if args.sweep:
            for task in measure_sweep(model, args, prompts, [report.tasks[index] for index in encoded]):
                report.sweep.append(task)
                report.write(args.output, complete=False)
    except KeyboardInterrupt:
        done = len(report.runs[AUTOREGRESSIVE])
        kept = f"; {done} runs of each method are in {outputs(args.output)[0]}" if done else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    report.show(console)
    for path in report.write(args.output):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0 if report.identical else 1


def _encode(
    args: argparse.Namespace, console: Console, decoder: SelfSpeculativeDecoder, tokenizer: Any, report: Report
) -> dict[int, Tensor]:
    """Encode the prompts [1, N] that fit, by index; print and record why the others are skipped."""
    encoded = {}
    for index, text in enumerate(report.prompts):
        ids = options.encode(tokenizer, text, args.device)
        try:
            validation.prompt(ids, decoder.model.vocab_size, decoder.model.device)
            validation.length(ids.shape[1], args.max_new_tokens, decoder.max_seq_len)
        except ValueError as error:
            report.skipped.append(Skipped(index, str(error)))
            console.print(f"skipped prompt {index}: {error}", style="yellow", highlight=False, soft_wrap=True)
        else:
            encoded[index] = ids
    if not encoded:
        raise ValueError(
            f"none of {len(report.prompts)} prompts can be measured; the first: {report.skipped[0].reason}"
        )
    return encoded


# Measuring: each prompt with each method.


@dataclass
class Stopwatch:
    """A streamer that records when each group of tokens arrives, for any ``generate``, ours or transformers'."""

    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Record new tokens; the first call is the prompt."""
        now = time.perf_counter()
        if not self.started:
            self.started = now
            return
        self.arrivals.append(now)
        self.counts.append(value.numel())

    def end(self) -> None:
        pass

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.arrivals[0] - self.started

    @property
    def first_tokens(self) -> int:
        """New tokens of the first group."""
        return self.counts[0]

    @property
    def tokens(self) -> int:
        """New tokens after the first group."""
        return sum(self.counts[1:])

    @property
    def seconds(self) -> float:
        """Seconds from the first group of new tokens to the last."""
        return self.arrivals[-1] - self.arrivals[0]


@dataclass
class Run:
    """One prompt with one method.

    ``tokens`` in ``seconds`` exclude the first token, which takes ``first_token`` seconds, and all others of its group
    of ``first_tokens``. ``drafts`` counts draft tokens by source, ``told`` has the texts of all tokens.
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
    told: Trace = field(default_factory=Trace)

    @property
    def rate(self) -> float:
        """Tokens/s after the first token."""
        return self.tokens / self.seconds


Method = Callable[[Tensor, int, Stopwatch], "GenerationOutput | None"]


def decoding_methods(model: Any, decoder: SelfSpeculativeDecoder, only_ours: bool) -> dict[str, Method]:
    """The methods to compare, by name. Transformers drafts as many tokens as we do, whatever its confidence.

    It cannot choose an exit layer, so its early exit is left out if ours is "auto".
    """

    def ours(strategy: str) -> Method:
        return lambda ids, count, watch: decoder.generate(ids, count, strategy=strategy, streamer=watch)

    def transformers(**extra: Any) -> Method:
        def decode(ids: Tensor, count: int, watch: Stopwatch) -> None:
            mask = torch.ones_like(ids)
            model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, streamer=watch, **extra)

        return decode

    methods = {AUTOREGRESSIVE: ours("autoregressive"), SELF_SPECULATIVE: ours("self_speculative")}
    if not only_ours:
        methods[TRANSFORMERS] = transformers()
        if decoder.exit_layer != "auto":
            config = model.generation_config
            config.num_assistant_tokens = most_drafts(decoder)
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = 0.0
            methods[EARLY_EXIT_ASSISTED] = transformers(assistant_early_exit=decoder.exit_layer)
    return methods


def most_drafts(decoder: SelfSpeculativeDecoder) -> int:
    """The largest number of draft tokens of a round."""
    count = decoder.num_speculations
    most = count if isinstance(count, int) else decoder.controller.max_speculations
    return max(most, max_drafts(decoder.draft_source))


def _measure_all(
    args: argparse.Namespace, decoder: SelfSpeculativeDecoder, methods: dict[str, Method], encoded: dict[int, Tensor],
    report: Report,
) -> None:  # fmt: skip
    """Run every prompt with each method, and write the report after each prompt."""
    first = next(iter(encoded.values()))
    for method in methods.values():  # warm-up
        method(first, min(2 * most_drafts(decoder), decoder.max_seq_len - first.shape[1]), Stopwatch())
    memory = ReadBandwidth(args.device)
    order = [index for _ in range(args.repeats) for index in encoded]
    with options.progress() as progress:
        for index in progress.track(order, description="measuring"):
            memory.sample()
            runs = {
                name: _measure(name, method, index, encoded[index], args, decoder) for name, method in methods.items()
            }
            for name, one in runs.items():
                report.runs[name].append(one)
            report.bandwidth = memory.median
            report.write(args.output, complete=False)


def _measure(name: str, method: Method, prompt: int, input_ids: Tensor, args: Any, decoder: Any) -> Run:
    watch = Stopwatch()
    out = method(input_ids, args.max_new_tokens, watch)
    run = Run(prompt, watch.tokens, watch.seconds, watch.time_to_first_token, watch.first_tokens)
    if out is not None:
        if name != SELF_SPECULATIVE or decoder.draft_source == NGRAM:  # every round reads the model once
            run.bytes_per_token = bytes_per_token(decoder.model, out.stats)
        elif decoder.exit_layer != "auto" and decoder.draft_source != AUTO:  # else unknown, since rounds differ
            run.bytes_per_token = bytes_per_token(decoder.model, out.stats, decoder.exit_layer)
        run.drafted, run.accepted = out.stats.drafted, out.stats.accepted
        run.drafts = Drafts.of(out.stats)
        run.sequence = out.new_tokens[0].tolist()
        run.told = Trace.of(decoder.tokenizer, input_ids[0].tolist(), run.sequence, out.stats.records)
    return run


def head_bytes(head: EarlyExitHead) -> int:
    """Bytes of a head's weights; of a token map only single entries are read."""
    scale = 0 if head.scale is None else head.scale.nbytes
    return head.norm_weight.nbytes + head.head_weight.nbytes + scale


def layer_bytes(model: LayerSkipModel, start: int, end: int) -> int:
    """Bytes of the weights of layers [start, end)."""
    return sum(weight.nbytes for weight in model.decoder.layer_weights(start, end))


def bytes_per_token(model: LayerSkipModel, stats: Stats, exit_layer: int | None = None) -> float:
    """Bytes read for the new tokens after the first, over their number.

    Without ``exit_layer``, each token reads the whole model. With it, a round of K draft tokens reads layers [0, E) and
    the draft layers K + 1 times, the draft head K times, and the other layers and the head once. The context is taken
    at its mean length.
    """
    decoder = model.decoder
    context = stats.prompt_tokens + stats.new_tokens / 2
    kv_layer = 2 * decoder.num_kv_heads * decoder.head_dim * model.dtype.itemsize * context
    num_layers, below = model.num_layers, exit_layer or 0
    upper = layer_bytes(model, below, num_layers) + kv_layer * (num_layers - below) + head_bytes(model.head)
    total = stats.rounds * upper
    if exit_layer is not None:
        draft_layers = layer_bytes(model, num_layers, num_layers + decoder.num_draft_layers)
        lower = layer_bytes(model, 0, below) + draft_layers + kv_layer * (below + decoder.num_draft_layers)
        total += (stats.drafted + stats.rounds) * lower + stats.drafted * head_bytes(model.draft_head)
    return total / max(1, stats.new_tokens - 1)


# Measuring: batches, and a sweep of fixed settings against "auto".


@dataclass
class BatchSpeed:
    """Tokens/s of a whole batch by method, prompts included."""

    size: int
    tokens_per_second: dict[str, float]
    identical: bool


def measure_batches(
    decoder: SelfSpeculativeDecoder, model: Any, encoded: Sequence[Tensor], sizes: Sequence[int], new_tokens: int
) -> Iterator[BatchSpeed]:
    """Decode batches of ``encoded`` prompts [1, N], each row to its end or ``new_tokens``; padding does not count.

    Without ``model``, transformers is left out.
    """
    for size in sizes:
        prompts = [encoded[index % len(encoded)][0] for index in range(size)]
        plain, plain_speed = _timed(_our_batch, decoder, prompts, new_tokens, "autoregressive")
        out, speed = _timed(_our_batch, decoder, prompts, new_tokens, "self_speculative")
        speeds = {AUTOREGRESSIVE: plain_speed, SELF_SPECULATIVE: speed}
        if model is not None:
            _, speeds[TRANSFORMERS] = _timed(_their_batch, model, prompts, new_tokens)
        yield BatchSpeed(size, speeds, plain == out)


def _timed(
    decode: Callable[..., list[list[int]]], engine: Any, prompts: list[Tensor], *rest: Any
) -> tuple[list[list[int]], float]:
    """The tokens and tokens/s of the second of two calls."""
    decode(engine, prompts, *rest)
    start = time.perf_counter()
    rows = decode(engine, prompts, *rest)
    return rows, sum(map(len, rows)) / (time.perf_counter() - start)


def _our_batch(
    decoder: SelfSpeculativeDecoder, prompts: list[Tensor], new_tokens: int, strategy: str
) -> list[list[int]]:
    out = decoder.generate(prompts, new_tokens, strategy=strategy)
    return [row[: stats.new_tokens].tolist() for row, stats in zip(out.new_tokens, out.per_sequence, strict=True)]


def _their_batch(model: Any, prompts: list[Tensor], new_tokens: int) -> list[list[int]]:
    """Pad on the left, as transformers expects, and cut each row after its first EOS token."""
    flipped = [prompt.flip(0) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(flipped, batch_first=True).flip(1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in flipped], batch_first=True).flip(1)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    stops = validation.stop_tokens(model.generation_config.eos_token_id, model.config.vocab_size)
    rows = out[:, ids.shape[1] :].tolist()
    ends = [next((index + 1 for index, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@dataclass
class Sweep:
    """Tokens/s of one task after the first token: of every fixed (E, K), of "auto", and without drafts.

    ``by_source`` has those of the other draft sources. Exits stop drafting at tokens less probable than
    ``draft_threshold``.
    """

    task: str
    draft_threshold: float
    fixed: dict[str, float]
    auto: float
    autoregressive: float
    by_source: dict[str, float]


def measure_sweep(
    model: Any, args: argparse.Namespace, encoded: Sequence[Tensor], tasks: Sequence[str]
) -> Iterator[Sweep]:
    """Decode the prompts of each task with all settings, without a draft threshold and with one, interleaved.

    "auto" starts each task and threshold with nothing learned. A task's results are yielded once it is measured.
    """
    exit = None if args.exit == arguments.NO_EXIT else args.exit
    drafts: dict[str, Any] = {"draft_head": options.draft_head(args), "exit": exit}
    for task in dict.fromkeys(tasks):
        prompts = [ids for ids, own in zip(encoded, tasks, strict=True) if own == task]
        decoders = [
            SelfSpeculativeDecoder(model, "auto", "auto", draft_threshold=threshold, draft_source=EXIT, **drafts)
            for threshold in (0.0, args.draft_threshold or THRESHOLD)
        ]
        settings: dict[str, dict[str, Any]] = {"auto": {}, "autoregressive": {"strategy": "autoregressive"}}
        settings |= {f"source {source}": {"draft_source": source} for source in OTHER_SOURCES}
        for exit_layer in decoders[0].controller.exits:
            for count in NUM_SPECULATIONS:
                settings[f"E={exit_layer}, K={count}"] = {"exit_layer": exit_layer, "num_speculations": count}
        rates: list[dict[str, list[float]]] = [defaultdict(list) for _ in decoders]
        for ids in prompts * args.repeats:
            for name, setting in settings.items():
                for decoder, own in zip(decoders, rates, strict=True):
                    watch = Stopwatch()
                    decoder.generate(ids, args.max_new_tokens, streamer=watch, eos_token_id=[], **setting)
                    own[name].append(watch.tokens / watch.seconds)
        for decoder, own in zip(decoders, rates, strict=True):
            speeds = {name: mean(values) for name, values in own.items()}
            auto, plain = speeds.pop("auto"), speeds.pop("autoregressive")
            by_source = {source: speeds.pop(f"source {source}") for source in OTHER_SOURCES}
            yield Sweep(task, decoder.draft_threshold, speeds, auto, plain, by_source)


# Reporting.


@dataclass
class Skipped:
    """A prompt that cannot be measured, and why."""

    prompt: int
    reason: str


def outputs(stem: Path) -> list[Path]:
    """The files of `Report.write`."""
    return [stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".png")]


def _if_known(form: str, key: str) -> Callable[[str, dict[str, float]], str]:
    """A cell that is empty if the bytes per token are unknown, as for transformers."""
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


@dataclass
class Report:
    """All runs by method, and what they are compared with.

    ``tasks`` and ``prompts`` are those of all prompts, ``skipped`` the prompts that were not run. ``bandwidth`` is the
    memory's read speed in GB/s, measured in the same run; ``machine`` are the facts of `options.facts`.
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
        """Medians of a method, and its speedup over our autoregressive decoding by both common definitions.

        None if no run gave a token after its first ones, so that there is no speed; see `no_speed`.

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
        """Why a method has no summary."""
        at_once = [run.first_tokens for run in self.runs[name] if run.first_tokens > 1]
        if not at_once:
            return f"{name}: every run ended at its first token, so there is no speed after it; take other prompts"
        return (
            f"{name}: every run gave all its tokens at once (up to {max(at_once)}), so there is no speed after the "
            "first; take more --max-new-tokens"
        )

    def by_task(self) -> dict[str, dict[str, dict[str, float] | None]]:
        """Summaries of each task."""
        members = {task: {index for index, other in enumerate(self.tasks) if other == task} for task in self.tasks}
        return {task: {name: self.summary(name, chosen) for name in self.runs} for task, chosen in members.items()}

    def _title(self) -> str:
        """The model, its dtype, the format of packed weights, and the device."""
        model, dtype, device = (self.settings[key] for key in ("model", "dtype", "device"))
        weights = self.settings.get("weights", dtype)
        kind = dtype if weights == dtype else f"{weights} in {dtype}"
        return (
            f"{model}, {kind}, {self.settings['threads']} threads" if device == "cpu" else f"{model}, {kind}, {device}"
        )

    def show(self, console: Console) -> None:
        """Print the tables and the verdict."""
        console.print(self._table())
        drafts = Drafts.sum(run.drafts for run in self.runs[SELF_SPECULATIVE])
        console.print(
            f"drafts accepted, by source (and place in the round): {str(drafts) or 'nothing was drafted'}",
            highlight=False,
        )
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
            console.print(self._throughput_table())
        if self.sweep:
            console.print(self._sweep_table())
        if self.identical:
            console.print("[green]✓[/green] self-speculative and autoregressive tokens are identical")
        else:
            console.print("[red]✗ self-speculative tokens differ from the autoregressive ones: no speedup counts[/red]")

    def _table(self) -> Table:
        setting = self.settings
        title = f"{self._title()}, E={setting['exit_layer']} of {setting['layers']}, K={setting['num_speculations']}"
        if setting["draft_source"] != EXIT:
            title += f", drafts from {setting['draft_source']}"
        if setting["draft_threshold"]:
            title += f", threshold {setting['draft_threshold']:g}"
        columns = [(name, self.summary(name)) for name in self.runs]
        rows = (
            (label, *("" if values is None else cell(name, values) for name, values in columns))
            for label, cell in _ROWS.items()
        )
        return table(title, ("", *self.runs), rows)

    def _throughput_table(self) -> Table:
        names = list(self.throughput[0].tokens_per_second)
        rows = (
            (str(batch.size), *(f"{speeds[name]:.1f}" for name in names),
             f"{speeds[SELF_SPECULATIVE] / speeds[AUTOREGRESSIVE]:.2f}×")
            for batch in self.throughput for speeds in [batch.tokens_per_second]
        )  # fmt: skip
        return table("tokens/s of a batch, prompts included", ("batch", *names, "speedup"), rows)

    def _sweep_table(self) -> Table:
        """A line for each task and threshold."""
        columns = ["task", "threshold", "autoregressive", "auto", "best fixed", "auto / best", "worst fixed"]
        columns += [f"source {name}" for name in OTHER_SOURCES]
        rows = []
        for one in self.sweep:
            (worst, slow), *_, (best, fast) = sorted(one.fixed.items(), key=lambda item: item[1])
            rows.append(
                (one.task, f"{one.draft_threshold:g}", f"{one.autoregressive:.1f}", f"{one.auto:.1f}",
                 f"{fast:.1f} ({best})", f"{one.auto / fast:.2f}", f"{slow:.1f} ({worst})",
                 *(f"{one.by_source[name]:.1f}" for name in OTHER_SOURCES))
            )  # fmt: skip
        title = "tokens/s of auto and of fixed settings, by draft threshold"
        return table(title, columns, rows, unwrapped=("task", "auto / best"))

    def write(self, stem: Path, complete: bool = True) -> list[Path]:
        """Write ``<stem>.json`` and, of a ``complete`` measurement with a speed, ``<stem>.png``."""
        content = {
            "complete": complete,
            "settings": self.settings,
            "machine": self.machine,
            "read_gigabytes_per_second": self.bandwidth,
            "identical": self.identical,
            "summary": {name: self.summary(name) for name in self.runs},
            "by_task": self.by_task(),
            "throughput": [asdict(batch) for batch in self.throughput],
            "sweep": [asdict(task) for task in self.sweep],
            "prompts": [{"task": task, "text": text} for task, text in zip(self.tasks, self.prompts, strict=False)],
            "skipped": [asdict(prompt) for prompt in self.skipped],
            "runs": {name: [asdict(run) for run in runs] for name, runs in self.runs.items()},
        }
        data, picture = outputs(stem)
        write_atomically(data, json.dumps(content, indent=1).encode())
        speeds = {name: values for name in self.runs if (values := self.summary(name)) is not None}
        if not complete or AUTOREGRESSIVE not in speeds:
            return [data]
        with rendering.panels(size=(8, 1.2 + 0.5 * len(speeds))) as panels:
            _, _, axes = next(rendering.of_bench(content, panels))
            axes.set_title(self._title())
            write_atomically(picture, rendering.saved(axes))
        return [data, picture]
