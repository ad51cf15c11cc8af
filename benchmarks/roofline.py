"""Bytes that the CUDA kernels move, counted, against those that they must move: ``python -m benchmarks.roofline``.

The kernels run emulated (tests/cuda_emulation), where every load and store is seen; no card is needed. Shapes are a
16th of Llama-3.2-1B's weights, since the ratio of moved to needed bytes does not grow with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cuda_emulation import Traffic, library
from tests.kernels.cuda_ops.runners import Emulated

from .cuda_report import write

MARKERS = ("<!-- make roofline -->", "<!-- end of roofline -->")
HIDDEN, FEATURES, HEADS, GROUPS, SIZE, VOCABULARY, CAPACITY, LENGTH = 512, 2048, 8, 2, 64, 8192, 1024, 700
DTYPE = torch.bfloat16
EPS = 1e-5


class Counting(Emulated):
    """Notes what each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: list[Traffic] = []

    def call(self, file: str, entry: str, *args: Any, writes: list[Tensor]) -> None:
        """Run an entry, and count."""
        self.traffic += library(file).call(entry, *args, writes=writes, seed=self.seed, arch=self.arch, count=True)


@dataclass(frozen=True)
class Row:
    """An op: bytes that it must read and write, and what it does read from memory, from L2, and write."""

    name: str
    needed: int
    memory: int
    l2: int
    written: int

    @property
    def ratio(self) -> float:
        """Bytes that memory delivers and takes, over those that it must."""
        return (self.memory + self.written) / self.needed


def size(*tensors: Tensor) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(name: str, needed: int, run: Callable[[Counting], Any]) -> Row:
    """Run an op once and add up its kernels."""
    counting = Counting()
    run(counting)
    moved = counting.traffic
    return Row(
        name,
        needed,
        sum(one.distinct for one in moved),
        sum(one.by_block for one in moved),
        sum(one.written for one in moved),
    )


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Of the scale of a model's weights."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 0.05).to(dtype)


def layer() -> list[Tensor]:
    """The nine tensors of one layer."""
    queries, keys = HEADS * SIZE, GROUPS * SIZE
    shapes = [(queries, HIDDEN), (keys, HIDDEN), (keys, HIDDEN), (HIDDEN, queries)]
    mlp = [(FEATURES, HIDDEN), (FEATURES, HIDDEN), (HIDDEN, FEATURES)]
    return [random(HIDDEN), *(random(*one) for one in shapes), random(HIDDEN), *(random(*one) for one in mlp)]


def cases(rows: int) -> Iterable[Row]:
    """Every op of a step with ``rows`` rows of one sequence."""
    x, features, norm = random(rows, HIDDEN), random(rows, FEATURES), random(HIDDEN)
    square, gate, up = random(HIDDEN, HIDDEN), random(FEATURES, HIDDEN), random(FEATURES, HIDDEN)
    residual = random(rows, HIDDEN)
    head, scale = random(VOCABULARY, HIDDEN), torch.rand(VOCABULARY)
    narrow = torch.randint(-127, 128, (VOCABULARY, HIDDEN), dtype=torch.int8)
    token_map = torch.arange(VOCABULARY)
    q, k, v = random(1, rows, HEADS, SIZE), random(1, rows, GROUPS, SIZE), random(1, rows, GROUPS, SIZE)
    caches = [random(1, GROUPS, CAPACITY, SIZE) for _ in range(2)]
    angles = [torch.rand(CAPACITY, SIZE // 2) for _ in range(2)]
    lengths, live = torch.tensor([LENGTH]), 2 * GROUPS * (LENGTH + rows) * SIZE * 2
    turned = 2 * rows * SIZE // 2 * 4
    triple = rows * (8 + 4 + 4)  # token, logit, log-sum-exp

    yield measure("rms_norm", size(x, norm, x), lambda ops: ops.rms_norm(x, norm, EPS))
    yield measure("linear", size(x, square, residual, x), lambda ops: ops.linear(x, square, None, residual))
    yield measure("swiglu", size(x, gate, up, features), lambda ops: ops.swiglu(x, gate, up))
    yield measure(
        "rope_kv_append",
        2 * size(q, k, v) + turned + 8,
        lambda ops: ops.rope_kv_append(q, k, v, *angles, *caches, lengths),
    )
    yield measure("verify_attention", live + 2 * size(q) + 8, lambda ops: ops.verify_attention(q, *caches, lengths))
    weights, stacked = layer(), [cache[None] for cache in caches]
    appended = 2 * rows * GROUPS * SIZE * 2
    yield measure(
        "partial_forward, one layer",
        size(*weights, x, x) + live + appended + turned + 8,
        lambda ops: ops.partial_forward(x[None], weights, *stacked, *angles, lengths, 0, 1, EPS),
    )
    yield measure("exit_head", size(x, norm, head) + triple, lambda ops: ops.exit_head(x, norm, head, EPS))
    yield measure(
        "exit_head, int8 and token_map",
        size(x, norm, narrow, scale) + triple + 8 * rows,
        lambda ops: ops.exit_head(x, norm, narrow, EPS, token_map, scale),
    )


def accepting(drafted: int) -> Iterable[Row]:
    """The ops at the end of a round."""
    draft, target = torch.zeros(1, drafted, dtype=torch.int64), torch.zeros(1, drafted + 1, dtype=torch.int64)
    needed = size(draft, target) + 4 * 8
    yield measure("accept_greedy", needed, lambda ops: ops.accept_greedy(draft, target, torch.tensor([LENGTH])))
    logits = [random(1, rows, VOCABULARY, dtype=torch.float32) for rows in (drafted, drafted + 1)]
    options = (torch.tensor([LENGTH]), torch.ones(1), torch.ones(1, dtype=torch.int64))
    needed = size(draft, *logits, *options) + 3 * 8
    yield measure("accept_sampled", needed, lambda ops: ops.accept_sampled(draft, *logits, *options))


def markdown(rows: Iterable[tuple[str, Row]]) -> str:
    """A line an op and number of rows."""
    lines = ["| op | rows | must move | from memory | written | moved / must | from L2 |", "|---" * 7 + "|"]
    for count, row in rows:
        cells = [f"`{row.name}`", count, f"{row.needed:,}", f"{row.memory:,}", f"{row.written:,}", f"{row.ratio:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {row.l2:,} |")
    return "\n".join(lines)


def main() -> None:
    """Count, show, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--write", type=Path, help="a file with the markers of this table")
    args = parser.parse_args()
    found = [(str(rows), row) for rows in (1, 7) for row in cases(rows)]
    text = markdown([*found, *(("6 drafts", row) for row in accepting(6))])
    print(text)
    if args.write is not None:
        write(args.write, text, MARKERS)


if __name__ == "__main__":
    main()
