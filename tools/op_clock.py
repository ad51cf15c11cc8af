"""How much of a self-speculative round is spent outside the ops: Python, checks, dispatch, small calls of torch.

    python -m tools.op_clock --model smollm2-layerskip --exit-layer 4 --num-speculations 8 "Command: lock the door"

It takes the options of ``layerskip generate`` and needs a CPU, where ops are synchronous.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from torch import Tensor

from layerskip import _ends
from layerskip.cli import arguments, options
from layerskip.cli.bench import Stopwatch
from layerskip.decoding import SelfSpeculativeDecoder
from layerskip_kernels import dispatch


class OpClock:
    """Adds up the seconds that implementations of ops take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@contextmanager
def op_clock() -> Iterator[OpClock]:
    """Time every op on every backend within a ``with`` block. Meaningful on the CPU, where ops are synchronous."""
    clock = OpClock()
    before = dispatch.implementations()
    for op, backends in before.items():
        for backend, implementation in backends.items():
            timed = replace(implementation, function=clock.around(implementation.function))
            dispatch.register(op, backend, timed)
    try:
        yield clock
    finally:
        for op, backends in before.items():
            for backend, implementation in backends.items():
                dispatch.register(op, backend, implementation)


@dataclass
class OpShare(Stopwatch):
    """A stopwatch that also notes the op clock when the first and the last tokens arrive."""

    clock: OpClock = field(default_factory=OpClock)
    op_seconds_at: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        super().put(value)
        if self.arrivals:
            self.op_seconds_at.append(self.clock.seconds)

    @property
    def op_seconds(self) -> float:
        """Seconds inside ops between the first and the last arrival."""
        return self.op_seconds_at[-1] - self.op_seconds_at[0]


def outside_ops(decoder: SelfSpeculativeDecoder, input_ids: Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds that a self-speculative round spends outside the ops, and their share of the round."""
    with op_clock() as clock:
        watch = OpShare(clock=clock)
        out = decoder.generate(input_ids, new_tokens, streamer=watch, eos_token_id=[])
    outside = watch.seconds - watch.op_seconds
    return {"seconds_per_round": outside / out.stats.rounds, "fraction": outside / watch.seconds}


def main(given: Sequence[str] | None = None) -> None:
    """Decode the prompt and print the time of each op."""
    args, console = arguments.parse(["generate", *(given if given is not None else sys.argv[1:])]), Console()
    model, tokenizer = options.load(args, console)
    decoder = options.decoder(args, model)
    if decoder.model.device.type != "cpu":
        raise SystemExit("GPU calls are asynchronous, so host times do not measure them; use --device cpu")
    prompt = options.encode(tokenizer, args.prompt, args.device, args.chat)
    decoder.generate(prompt, args.max_new_tokens, eos_token_id=[])  # the first call allocates
    found = outside_ops(decoder, prompt, args.max_new_tokens)
    console.print(
        f"{found['seconds_per_round'] * 1e6:.0f} µs a round, {found['fraction']:.1%} of it, are outside the ops"
    )


if __name__ == "__main__":
    sys.exit(_ends.module("tools.op_clock", main))
