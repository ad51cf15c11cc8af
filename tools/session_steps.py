"""How long the steps of a session take while prompts of others are read: `python -m tools.session_steps`.

One request runs, or several; after some steps, four prompts arrive together. Median, 95th percentile and longest of the
steps with them over the median without, for each bound on the tokens of prompts that a step reads. `--cpu-time` with
`--threads 1` counts what this process used, so a busy machine gives about the figures of an idle one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from layerskip import SelfSpeculativeDecoder, Session, _ends

STEPS = 30


def measure(
    decoder: SelfSpeculativeDecoder,
    strategy: str,
    running: int,
    length: int,
    budget: int | str | None,
    clock: Callable[[], float],
) -> tuple[list[float], list[float], float]:
    """Seconds of each step without prompts, of each with four, and until all of them have a token."""
    decoder.clock = clock  # the bound goes by it, too
    session = decoder.open_session(running + 4, max_seq_len=length + 1600, prompt_tokens_per_step=budget)
    generator = torch.Generator().manual_seed(0)

    def add(tokens: int, count: int) -> int:
        ids = torch.randint(decoder.model.vocab_size, (tokens,), generator=generator)
        return session.add(ids, count, strategy=strategy, eos_token_id=[])

    for _ in range(running):
        add(16, 1500)
    session.step()
    quiet = [_seconds(session, clock)[0] for _ in range(STEPS)]
    missing, busy, started = {add(length, 2) for _ in range(4)}, [], clock()
    while missing:
        seconds, begun = _seconds(session, clock)
        busy.append(seconds)
        missing -= begun
    return quiet, busy, clock() - started


def _seconds(session: Session, clock: Callable[[], float]) -> tuple[float, set[int]]:
    start = clock()
    updates = session.step()
    return clock() - start, {update.request_id for update in updates if update.tokens}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line for each bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-layerskip")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--prompt-tokens", type=int, default=600)
    parser.add_argument("--strategies", nargs="+", default=["self_speculative", "autoregressive"])
    parser.add_argument(
        "--budgets", type=lambda text: text if text == "auto" else int(text), nargs="+", default=["auto", 64, 0],
        help="tokens, auto, or 0: no bound",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    _ends.declare(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    decoder = SelfSpeculativeDecoder.from_pretrained(args.model, exit_layer=4, num_speculations=8)
    for strategy, running, budget in itertools.product(args.strategies, args.running, args.budgets):
        quiet, busy, last = measure(decoder, strategy, running, args.prompt_tokens, budget or None, clock)
        step = statistics.median(quiet)
        print(
            f"{strategy}, {running} running, {budget or 'all'} tokens a step: {step * 1e3:.0f} ms "
            f"({_spread(quiet, step)}); with four prompts {_spread(busy, step)}; "
            f"all read in {last:.1f} s, {len(busy)} steps",
            flush=True,
        )


def _spread(seconds: Sequence[float], step: float) -> str:
    median, high = statistics.median(seconds), statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    return f"{median / step:.2f}×, 95 % ≤ {high / step:.2f}×, all ≤ {max(seconds) / step:.2f}×"


if __name__ == "__main__":
    sys.exit(_ends.module("tools.session_steps", main))
