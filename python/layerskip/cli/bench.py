"""Measure greedy decoding four ways, interleaved: our autoregressive and self-speculative, and transformers' own."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..bandwidth import ReadBandwidth
from ..decoding import GenerationOutput, SelfSpeculativeDecoder, Stats
from . import options, prompts, sweep, throughput
from .measure import OpShare, Stopwatch, op_clock
from .report import AUTOREGRESSIVE, EARLY_EXIT_ASSISTED, SELF_SPECULATIVE, TRANSFORMERS, Report, Run
from .traffic import bytes_per_token

Variant = Callable[[Tensor, int, Stopwatch], "GenerationOutput | None"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(parser)
    options.add_speculation(parser)
    parser.add_argument("--prompts", default="samples", help=prompts.HELP)
    parser.add_argument("--limit", type=options.positive, default=6, help="how many of the prompts")
    parser.add_argument("--max-new-tokens", type=options.positive, default=64, metavar="N")
    parser.add_argument("--repeats", type=options.positive, default=1, help="how often to run each prompt each way")
    parser.add_argument(
        "--batch-sizes", type=options.positive, nargs="+", default=[], metavar="B", help="measure batches, too: 1 2 4 8"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="compare auto with every exit layer and number of drafts, by task"
    )
    parser.add_argument("--only-ours", action="store_true", help="leave transformers out")
    parser.add_argument("--output", type=Path, default=Path("layerskip-bench"), help="JSON and PNG go to this stem")


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
    return count if isinstance(count, int) else decoder.controller.max_speculations


def _measure(name: str, way: Variant, prompt: int, input_ids: Tensor, args: Any, decoder: Any) -> Run:
    watch = Stopwatch()
    out = way(input_ids, args.max_new_tokens, watch)
    run = Run(prompt, watch.tokens, watch.seconds, watch.time_to_first_token)
    if out is not None:
        run.bytes_per_token = _bytes_per_token(name, decoder, out.stats)
        run.drafted, run.accepted = out.stats.drafted, out.stats.accepted
        run.sequence = out.new_tokens[0].tolist()
    return run


def _bytes_per_token(name: str, decoder: SelfSpeculativeDecoder, stats: Stats) -> float:
    """0, for not known, where the exit layer changes from round to round."""
    if name != SELF_SPECULATIVE:
        return bytes_per_token(decoder.model, stats)
    if isinstance(decoder.exit_layer, str):
        return 0.0
    return bytes_per_token(decoder.model, stats, decoder.exit_layer, decoder.draft_head)


def outside_ops(decoder: SelfSpeculativeDecoder, input_ids: Tensor, new_tokens: int) -> dict[str, float]:
    """Time that a self-speculative round spends outside the ops: Python, checks, dispatch, small torch calls."""
    with op_clock() as clock:
        watch = OpShare(clock=clock)
        out = decoder.generate(input_ids, new_tokens, streamer=watch, eos_token_id=[])
    outside = watch.seconds - watch.op_seconds
    return {"seconds_per_round": outside / out.stats.rounds, "fraction": outside / watch.seconds}


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print, and write; 1 if the self-speculative tokens differ from the autoregressive ones."""
    if args.max_new_tokens < 2:
        raise ValueError("--max-new-tokens must be at least 2: speed is measured after the first token")
    texts = prompts.read(args.prompts, args.limit)
    model, tokenizer = options.load(args, console)
    decoder = options.decoder(args, model)
    ways = variants(model, decoder, args.only_ours)
    encoded = [options.encode(tokenizer, prompt.text) for prompt in texts]
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        for way in ways.values():  # a warm-up, not measured
            way(encoded[0], 2 * most_drafts(decoder), Stopwatch())
        memory = ReadBandwidth()
        order = [(index, repeat) for repeat in range(args.repeats) for index in range(len(encoded))]
        for index, _ in track(order, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty()):
            memory.sample()
            for name, way in ways.items():
                runs[name].append(_measure(name, way, index, encoded[index], args, decoder))
    report = Report(
        settings=_settings(args, decoder),
        bandwidth=memory.median,
        outside_ops=outside_ops(decoder, encoded[0], max(args.max_new_tokens, 4 * most_drafts(decoder))),
        runs=runs,
        tasks=[prompt.task for prompt in texts],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        others = None if args.only_ours else model
        report.throughput = throughput.measure(decoder, others, encoded, args.batch_sizes, args.max_new_tokens)
    if args.sweep:
        report.sweep = sweep.measure(model, args, encoded, report.tasks)
    report.show(console)
    for path in report.write(args.output):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0 if report.identical else 1


def _settings(args: argparse.Namespace, decoder: SelfSpeculativeDecoder) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "layers": decoder.model.num_layers,
        "exit_layer": decoder.exit_layer,
        "num_speculations": decoder.num_speculations,
        "draft_threshold": decoder.draft_threshold,
        "draft_head": args.draft_head,
        "prompts": args.prompts,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
    }
