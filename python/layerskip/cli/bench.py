"""Benchmark greedy decoding: autoregressive, self-speculative, and transformers, interleaved."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .._files import check_output, write_atomically
from ..decoding import Choice, GenerationOutput, SelfSpeculativeDecoder, Stats, validation
from ..decoding.draft_sources import AUTO, EXIT, NGRAM, max_drafts
from ..devices import ReadBandwidth
from ..models import EarlyExitHead, LayerSkipModel
from . import arguments, options, plots
from .rendering import Drafts, Told
from .ways import AUTOREGRESSIVE, EARLY_EXIT_ASSISTED, SELF_SPECULATIVE, TRANSFORMERS


@dataclass
class Stopwatch:
    """A streamer that notes when each group of tokens arrives; any ``generate`` takes it, ours or transformers'."""

    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """The first call is the prompt, the others are new tokens."""
        now = time.perf_counter()
        if not self.started:
            self.started = now
            return
        self.arrivals.append(now)
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing follows."""

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
        """New tokens after the first group, whose time is the prompt's."""
        return sum(self.counts[1:])

    @property
    def seconds(self) -> float:
        """From the first group of new tokens to the last."""
        return self.arrivals[-1] - self.arrivals[0]


def head_bytes(head: EarlyExitHead) -> int:
    """The head's rows and their scales; of a token map only single entries are read."""
    scale = 0 if head.scale is None else head.scale.nbytes
    return head.norm_weight.nbytes + head.head_weight.nbytes + scale


def layer_bytes(model: LayerSkipModel, start: int, end: int) -> int:
    """The weights of layers [start, end)."""
    return sum(weight.nbytes for weight in model.decoder.layer_weights(start, end))


def bytes_per_token(model: LayerSkipModel, stats: Stats, exit_layer: int | None = None) -> float:
    """Bytes that the new tokens after the first cost to read, over their number.

    Without ``exit_layer``: each token reads the whole model. With it: a round of K drafts reads layers [0, E) and the
    draft layers K + 1 times, the draft head K times, the other layers and the head once. The context is taken at its
    mean length.
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


DRAFTS = (1, 2, 4, 8, 12)
OTHERS = (NGRAM, AUTO)  # sources that are compared with exits
THRESHOLD = 0.5  # what is compared with none, unless --draft-threshold says another


@dataclass
class Sweep:
    """Tokens a second after the first token, of one task: of every fixed (E, K), of "auto", of the full model.

    ``by_source`` has those of the other draft sources. Drafts of exits end at tokens less probable than
    ``draft_threshold``.
    """

    task: str
    draft_threshold: float
    fixed: dict[str, float]
    auto: float
    autoregressive: float
    by_source: dict[str, float]

    @property
    def best(self) -> tuple[str, float]:
        """The fastest (E, K)."""
        return max(self.fixed.items(), key=lambda item: item[1])

    @property
    def worst(self) -> tuple[str, float]:
        """The slowest (E, K)."""
        return min(self.fixed.items(), key=lambda item: item[1])


def measure_sweep(
    model: Any, args: argparse.Namespace, encoded: Sequence[Tensor], tasks: Sequence[str]
) -> Iterator[Sweep]:
    """Decode the prompts of each task every way, without a draft threshold and with one, all interleaved.

    "auto" starts each task and threshold with nothing learned. A task's two results come as soon as they are there.
    """
    thresholds = (0.0, args.draft_threshold or THRESHOLD)
    for task in dict.fromkeys(tasks):
        prompts = [ids for ids, own in zip(encoded, tasks, strict=True) if own == task]
        decoders = [
            SelfSpeculativeDecoder(
                model, "auto", "auto", draft_head=options.draft_head(args), draft_threshold=threshold, exit=args.exit
            )
            for threshold in thresholds
        ]
        for decoder, speeds in zip(decoders, _speeds(decoders, prompts, args), strict=True):
            auto, plain = speeds.pop("auto"), speeds.pop("autoregressive")
            by_source = {source: speeds.pop(f"source {source}") for source in OTHERS}
            yield Sweep(task, decoder.draft_threshold, speeds, auto, plain, by_source)


def _speeds(
    decoders: Sequence[SelfSpeculativeDecoder], prompts: Sequence[Tensor], args: argparse.Namespace
) -> list[dict[str, float]]:
    """For each decoder the mean tokens a second of each way."""
    choices = [Choice(exit_layer, count) for exit_layer in decoders[0].controller.exits for count in DRAFTS]
    ways: dict[str, dict[str, Any]] = {"auto": {}, "autoregressive": {"strategy": "autoregressive"}}
    ways |= {f"source {source}": {"draft_source": source} for source in OTHERS}
    ways |= {f"E={one.exit_layer}, K={one.num_speculations}": one._asdict() for one in choices}
    rates: list[dict[str, list[float]]] = [defaultdict(list) for _ in decoders]
    for ids in list(prompts) * args.repeats:
        for name, way in ways.items():
            for decoder, own in zip(decoders, rates, strict=True):
                watch = Stopwatch()
                decoder.generate(ids, args.max_new_tokens, streamer=watch, eos_token_id=[], **way)
                own[name].append(watch.tokens / watch.seconds)
    return [{name: mean(values) for name, values in own.items()} for own in rates]


def sweep_table(sweeps: Sequence[Sweep]) -> Table:
    """A line for each task and threshold."""
    table = Table(title="tokens/s of auto and of fixed choices, by draft threshold", title_justify="left")
    columns = ("task", "threshold", "autoregressive", "auto", "best fixed", "auto / best", "worst fixed")
    for column in (*columns, *(f"source {name}" for name in OTHERS)):
        table.add_column(column, no_wrap=column in ("task", "auto / best"))
    for one in sweeps:
        (best, speed), (worst, slow) = one.best, one.worst
        cells = (f"{one.autoregressive:.1f}", f"{one.auto:.1f}", f"{speed:.1f} ({best})", f"{one.auto / speed:.2f}")
        others = (f"{one.by_source[name]:.1f}" for name in OTHERS)
        table.add_row(one.task, f"{one.draft_threshold:g}", *cells, f"{slow:.1f} ({worst})", *others)
    return table


@dataclass
class BatchSpeed:
    """Tokens a second of all sequences of a batch together, by the way of decoding; the prompts' time counts."""

    size: int
    tokens_per_second: dict[str, float]
    identical: bool


def measure_batches(
    decoder: SelfSpeculativeDecoder, model: Any, encoded: Sequence[Tensor], sizes: Sequence[int], new_tokens: int
) -> Iterator[BatchSpeed]:
    """Decode batches of ``encoded`` prompts [1, N], each row to its end or ``new_tokens``; each as it is measured.

    Only the tokens of the rows themselves count, not what pads them. Without ``model``, ours alone.
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
    """What the second of two calls gives, and its tokens a second."""
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
    """Padded on the left, as transformers wants it, and cut after each row's first EOS token."""
    flipped = [prompt.flip(0) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(flipped, batch_first=True).flip(1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in flipped], batch_first=True).flip(1)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    stops = validation.stop_tokens(model.generation_config.eos_token_id, model.config.vocab_size)
    rows = out[:, ids.shape[1] :].tolist()
    ends = [next((index + 1 for index, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def throughput_table(batches: Sequence[BatchSpeed]) -> Table:
    """A line for each size."""
    names = list(batches[0].tokens_per_second)
    table = Table("batch", *names, "speedup", title="tokens/s of a batch, prompts included", title_justify="left")
    for batch in batches:
        speeds = batch.tokens_per_second
        speedup = speeds[SELF_SPECULATIVE] / speeds[AUTOREGRESSIVE]
        table.add_row(str(batch.size), *(f"{speeds[name]:.1f}" for name in names), f"{speedup:.2f}×")
    return table


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
        with plots.panels(size=(8, 1.2 + 0.5 * len(speeds))) as panels:
            _, _, axes = next(plots.of_bench(content, panels))
            axes.set_title(f"{self.settings['model']}, {kind(self.settings)}, {where(self.settings)}")
            write_atomically(picture, plots.saved(axes))
        return [data, picture]


Variant = Callable[[Tensor, int, Stopwatch], "GenerationOutput | None"]


def _ours(decoder: SelfSpeculativeDecoder, strategy: str) -> Variant:
    def run(input_ids: Tensor, new_tokens: int, watch: Stopwatch) -> GenerationOutput:
        return decoder.generate(input_ids, new_tokens, strategy=strategy, streamer=watch)

    return run


def _transformers(model: Any, **extra: Any) -> Variant:
    def run(input_ids: Tensor, new_tokens: int, watch: Stopwatch) -> None:
        mask = torch.ones_like(input_ids)
        model.generate(
            input_ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=watch, **extra
        )

    return run


def variants(model: Any, decoder: SelfSpeculativeDecoder, only_ours: bool) -> dict[str, Variant]:
    """The ways of decoding, by name. Transformers drafts as many tokens as we do, whatever its confidence.

    It has no exit layer of its own choice, so where ours is "auto" its early exit is left out.
    """
    ways = {
        AUTOREGRESSIVE: _ours(decoder, "autoregressive"),
        SELF_SPECULATIVE: _ours(decoder, "self_speculative"),
    }
    if not only_ours:
        ways[TRANSFORMERS] = _transformers(model)
    if not only_ours and decoder.exit_layer != "auto":
        config = model.generation_config
        config.num_assistant_tokens = most_drafts(decoder)
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0
        ways[EARLY_EXIT_ASSISTED] = _transformers(model, assistant_early_exit=decoder.exit_layer)
    return ways


def most_drafts(decoder: SelfSpeculativeDecoder) -> int:
    """The most tokens that a round drafts."""
    count = decoder.num_speculations
    most = count if isinstance(count, int) else decoder.controller.max_speculations
    return max(most, max_drafts(decoder.draft_source))


def _measure(name: str, way: Variant, prompt: int, input_ids: Tensor, args: Any, decoder: Any) -> Run:
    watch = Stopwatch()
    out = way(input_ids, args.max_new_tokens, watch)
    run = Run(prompt, watch.tokens, watch.seconds, watch.time_to_first_token, watch.first_tokens)
    if out is not None:
        run.bytes_per_token = _bytes_per_token(name, decoder, out.stats)
        run.drafted, run.accepted = out.stats.drafted, out.stats.accepted
        run.drafts = Drafts.of(out.stats)
        run.sequence = out.new_tokens[0].tolist()
        run.told = Told.of(decoder.tokenizer, input_ids[0].tolist(), run.sequence, out.stats.records)
    return run


def _bytes_per_token(name: str, decoder: SelfSpeculativeDecoder, stats: Stats) -> float:
    """0, for not known, where the exit layer or the source of drafts changes from round to round."""
    if name != SELF_SPECULATIVE or decoder.draft_source == NGRAM:  # every round reads the model once
        return bytes_per_token(decoder.model, stats)
    if isinstance(decoder.exit_layer, str) or decoder.draft_source == AUTO:
        return 0.0
    return bytes_per_token(decoder.model, stats, decoder.exit_layer)


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, and write; 1 if the self-speculative tokens differ from the autoregressive ones."""
    if args.max_new_tokens < 2:
        raise ValueError("--max-new-tokens must be at least 2: speed is measured after the first token")
    for path in outputs(args.output):
        check_output(path, args.overwrite)
    texts = arguments.read_prompts(args.prompts, args.limit)
    model, tokenizer = options.load(args, console)
    args.only_ours |= isinstance(model, LayerSkipModel)  # transformers does not have packed weights
    decoder = options.decoder(args, model)
    decoder.tokenizer = tokenizer
    ways = variants(model, decoder, args.only_ours)
    report = Report(_settings(args, decoder), [prompt.task for prompt in texts], {name: [] for name in ways})
    report.prompts, report.machine = [prompt.text for prompt in texts], options.facts(args.device)
    encoded = _encode(args, console, decoder, tokenizer, texts, report)
    try:
        _measure_all(args, decoder, ways, encoded, report)
        _measure_more(args, model, decoder, encoded, report)
    except KeyboardInterrupt:
        done = len(report.runs[AUTOREGRESSIVE])
        kept = f"; {done} runs a way are in {outputs(args.output)[0]}" if done else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    report.show(console)
    for path in report.write(args.output):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0 if report.identical else 1


def _encode(
    args: argparse.Namespace, console: Console, decoder: SelfSpeculativeDecoder, tokenizer: Any,
    texts: Sequence[arguments.Prompt], report: Report,
) -> dict[int, Tensor]:  # fmt: skip
    """The prompts [1, N] that can be measured, by their index; what is wrong with the others is printed and noted."""
    encoded = {}
    for index, prompt in enumerate(texts):
        ids = options.encode(tokenizer, prompt.text, args.device)
        try:
            validation.prompt(ids, decoder.model.vocab_size, decoder.model.device)
            validation.length(ids.shape[1], args.max_new_tokens, decoder.max_seq_len)
        except ValueError as error:
            report.skipped.append(Skipped(index, str(error)))
            console.print(f"skipped prompt {index}: {error}", style="yellow", highlight=False, soft_wrap=True)
        else:
            encoded[index] = ids
    if not encoded:
        raise ValueError(f"none of {len(texts)} prompts can be measured; the first: {report.skipped[0].reason}")
    return encoded


def _measure_all(
    args: argparse.Namespace, decoder: SelfSpeculativeDecoder, ways: dict[str, Variant], encoded: dict[int, Tensor],
    report: Report,
) -> None:  # fmt: skip
    """Run every prompt each way, and write after each."""
    first = next(iter(encoded.values()))
    for way in ways.values():  # a warm-up, not measured
        way(first, min(2 * most_drafts(decoder), decoder.max_seq_len - first.shape[1]), Stopwatch())
    memory = ReadBandwidth(args.device)
    order = [(index, repeat) for repeat in range(args.repeats) for index in encoded]
    for index, _ in track(order, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        memory.sample()
        measured = {name: _measure(name, way, index, encoded[index], args, decoder) for name, way in ways.items()}
        for name, one in measured.items():
            report.runs[name].append(one)
        report.bandwidth = memory.median
        report.write(args.output, complete=False)


def _measure_more(
    args: argparse.Namespace, model: Any, decoder: SelfSpeculativeDecoder, encoded: dict[int, Tensor], report: Report
) -> None:
    """What else the options ask for, written as it comes."""
    prompts_ids = list(encoded.values())
    others = None if args.only_ours else model
    for batch in measure_batches(decoder, others, prompts_ids, args.batch_sizes, args.max_new_tokens):
        report.throughput.append(batch)
        report.write(args.output, complete=False)
    if args.sweep:
        for task in measure_sweep(model, args, prompts_ids, [report.tasks[index] for index in encoded]):
            report.sweep.append(task)
            report.write(args.output, complete=False)


def _settings(args: argparse.Namespace, decoder: SelfSpeculativeDecoder) -> dict[str, Any]:
    return {
        **options.settings(args, decoder.model),
        "exit_layer": decoder.exit_layer,
        "num_speculations": decoder.num_speculations,
        "draft_threshold": decoder.draft_threshold,
        "draft_head": args.draft_head,
        "draft_source": args.draft_source,
        "exit": args.exit,
        "prompts": args.prompts,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
    }
