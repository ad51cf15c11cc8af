"""Measure greedy decoding four ways, interleaved: our autoregressive and self-speculative, and transformers' own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .._files import check_output
from ..bandwidth import ReadBandwidth
from ..decoding import GenerationOutput, SelfSpeculativeDecoder, Stats, validation
from ..decoding.source import AUTO, NGRAM, max_drafts
from ..models import LayerSkipModel
from . import machine, options, prompts, sweep, throughput
from .bench_report import Report, Run, Skipped, outputs
from .drafts import Drafts
from .measure import Stopwatch
from .told import Told
from .traffic import bytes_per_token
from .ways import AUTOREGRESSIVE, EARLY_EXIT_ASSISTED, SELF_SPECULATIVE, TRANSFORMERS

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
    texts = prompts.read(args.prompts, args.limit)
    model, tokenizer = options.load(args, console)
    args.only_ours |= isinstance(model, LayerSkipModel)  # transformers does not have packed weights
    decoder = options.decoder(args, model)
    decoder.tokenizer = tokenizer
    ways = variants(model, decoder, args.only_ours)
    report = Report(_settings(args, decoder), [prompt.task for prompt in texts], {name: [] for name in ways})
    report.prompts, report.machine = [prompt.text for prompt in texts], machine.facts(args.device)
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
    texts: Sequence[prompts.Prompt], report: Report,
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
    for batch in throughput.measure(decoder, others, prompts_ids, args.batch_sizes, args.max_new_tokens):
        report.throughput.append(batch)
        report.write(args.output, complete=False)
    if args.sweep:
        for task in sweep.measure(model, args, prompts_ids, [report.tasks[index] for index in encoded]):
            report.sweep.append(task)
            report.write(args.output, complete=False)


def _settings(args: argparse.Namespace, decoder: SelfSpeculativeDecoder) -> dict[str, Any]:
    return {
        **machine.settings(args, decoder.model),
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
