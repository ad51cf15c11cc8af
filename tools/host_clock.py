"""What the host does in a round whose work is recorded, in microseconds: ``python -m tools.host_clock``.

A stand-in for a GPU replays nothing and gives the same result again and again, so only Python remains of a step,
and the small calls of torch around a replay. The model has the layers of a real one, and next to no weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from layerskip import SamplingParams, SelfSpeculativeDecoder
from layerskip.decoding.cuda_graphs import Graphs
from layerskip.decoding.session import Session

LAYERS, DRAFTS = 30, 4
KINDS = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(0.7, seed=1),
    "top-k, top-p, penalty": SamplingParams(0.7, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=1),
}


class NoEvent:
    """An event in a stream where nothing happens."""

    def record(self, stream: Any) -> None: ...
    def wait(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        return 1.0


class NoGpu:
    """A GPU on which a round takes no time, and accepts half of its drafts."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        result = function().clone()
        result.fill_(3)[:, 0] = DRAFTS // 2
        return result, lambda: None

    def host_memory(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    def event(self) -> NoEvent:
        return NoEvent()

    def stream(self) -> int:
        return 0


def decoder() -> SelfSpeculativeDecoder:
    """Of a model with many layers, each of a few weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8192,
    )  # fmt: skip
    return SelfSpeculativeDecoder(LlamaForCausalLM(config).eval(), exit_layer=4, num_speculations=DRAFTS)


def steps(decoder: SelfSpeculativeDecoder, batch: int, sampling: SamplingParams, graphs: Graphs) -> Iterator[float]:
    """Microseconds of process time of one step after another, once rounds are recorded."""
    cache = decoder.model.decoder.new_cache(batch, 8192)
    session = Session(decoder.model, cache, decoder.defaults, decoder.controller, 8000, DRAFTS, graphs=graphs)
    for _ in range(batch):
        session.add([1, 2, 3], 7900, sampling=sampling, eos_token_id=[])
    for _ in range(20):
        session.step()
    while True:
        started = time.process_time_ns()
        session.step()
        yield (time.process_time_ns() - started) / 1e3


def main(argv: list[str] | None = None) -> None:
    """Print a line for each kind of round and number of sequences."""
    parser = argparse.ArgumentParser(prog="python -m tools.host_clock", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    made = decoder()
    for name, sampling in KINDS.items():
        for batch in (1, 4):
            clock = steps(made, batch, sampling, Graphs(NoGpu()))
            taken = statistics.median(next(clock) for _ in range(args.steps))
            print(f"{name}, {batch} running: {taken:.1f} us a step")


if __name__ == "__main__":
    main()
