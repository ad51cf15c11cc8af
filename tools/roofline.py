"""Bytes that the CUDA kernels move, counted, against those that they must move: ``python -m tools.roofline``.

The kernels run emulated (tests/cuda_emulation), where every load and store is seen; no GPU is needed. What is counted
is a model of a 16th of Llama-3.2-1B's weights, since the ratio of moved to needed bytes does not grow with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels.formats import FORMATS
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, layer_shapes
from tests.cuda_emulation import Traffic, library
from tests.kernels.cuda_ops.runners import Emulated

HEAD = """# CUDA kernels: bytes moved

Written by `python -m tools.roofline` (`make cuda-report`), which needs neither nvcc nor a GPU: the kernels run in
`tests/cuda_emulation`, where every load and store is counted. *Must move*: inputs and outputs once. *From
memory*: every 32-byte sector that a launch touches, once a launch. *From L2*: every sector once for each block
that touches it, on a device of 4 multiprocessors. bf16, one sequence, hidden size 512, 2048 features, 8 query and
2 key/value heads of 64, 700 cached positions, vocabulary 8192; larger weights bring the ratios of the matrix
kernels closer to 1. The second table is for Llama-3.2-1B with 1024 cached positions, at the 3.35 TB/s of an
H100's data sheet.

"""
DTYPE = torch.bfloat16
EPS, H100 = 1e-5, 3.35e12  # bytes a second, by its data sheet


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the positions that are cached."""

    hidden: int
    features: int
    heads: int
    groups: int
    size: int
    vocabulary: int
    length: int
    device: str = "cpu"

    def tensor(self, *sizes: int, dtype: torch.dtype = DTYPE) -> Tensor:
        """Of the scale of a model's weights."""
        if self.device == "meta":
            return torch.empty(sizes, dtype=dtype, device="meta")
        if not dtype.is_floating_point:
            return torch.randint(0 if dtype == torch.uint8 else -100, 100, sizes, dtype=dtype)
        return (torch.randn(sizes, generator=torch.Generator().manual_seed(len(sizes))) * 0.05).to(dtype)

    def layer(self) -> list[Tensor]:
        """The nine tensors of one layer."""
        shapes = layer_shapes(self.hidden, self.heads, self.groups, self.size, self.features)
        return [self.tensor(*shapes[name]) for name in REQUIRED_WEIGHTS]


COUNTED = Shape(512, 2048, 8, 2, 64, 8192, 700)
SHARED = ("linear", "swiglu", "exit_head", "linear, int8", "exit_head, int8", "exit_head, int4")
LLAMA_1B = Shape(2048, 8192, 32, 8, 64, 128256, 1024, device="meta")


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
    """An op: bytes that it must move at least, and bytes that it reads from memory and L2 and writes."""

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


Case = tuple[str, int, Callable[[Counting], Any]]


def cases(shape: Shape, rows: int) -> Iterator[Case]:
    """Every op of a step with ``rows`` rows of one sequence: name, bytes that it must move, how to run it."""
    make, hidden, head_size = shape.tensor, shape.hidden, shape.size
    x, features, norm = make(rows, hidden), make(rows, shape.features), make(hidden)
    square, gate, up = make(hidden, hidden), make(shape.features, hidden), make(shape.features, hidden)
    residual, weights = make(rows, hidden), shape.layer()
    q, k, v = (make(1, rows, heads, head_size) for heads in (shape.heads, shape.groups, shape.groups))
    caches = [make(1, shape.groups, shape.length + 64, head_size) for _ in range(2)]
    stacked, lengths = [cache[None] for cache in caches], torch.tensor([shape.length])
    angles = [make(shape.length + 64, head_size // 2, dtype=torch.float32) for _ in range(2)]
    live = 2 * shape.groups * (shape.length + rows) * head_size * DTYPE.itemsize
    turned, appended = rows * head_size * 4, size(k, v)
    yield "rms_norm", size(x, norm, x), lambda ops: ops.rms_norm(x, norm, EPS)
    yield "linear", size(x, square, residual, x), lambda ops: ops.linear(x, square, None, residual)
    yield "swiglu", size(x, gate, up, features), lambda ops: ops.swiglu(x, gate, up)
    rope = 2 * size(q, k, v) + turned + 8
    yield "rope_kv_append", rope, lambda ops: ops.rope_kv_append(q, k, v, *angles, *caches, lengths)
    yield "verify_attention", live + 2 * size(q) + 8, lambda ops: ops.verify_attention(q, *caches, lengths)
    yield (
        "partial_forward, one layer",
        size(*weights, x, x) + live + appended + turned + 8,
        lambda ops: ops.partial_forward(x[None], weights, *stacked, *angles, lengths, 0, 1, EPS),
    )
    yield from exit_heads(shape, x, norm)
    yield from packed(shape, x, residual, norm)


def packed(shape: Shape, x: Tensor, residual: Tensor, norm: Tensor) -> Iterator[Case]:
    """A matrix and the head in the formats of quantized weights: any bytes will do."""
    for name in ("int8", "int4"):
        width = FORMATS[name].row_bytes(shape.hidden)
        square, head = (shape.tensor(rows, width, dtype=torch.uint8) for rows in (shape.hidden, shape.vocabulary))
        yield f"linear, {name}", size(x, square, residual, x), partial(_linear, x, square, residual)
        yield f"exit_head, {name}", size(x, norm, head) + 16 * len(x), partial(_exit_head, x, norm, head)


def _linear(x: Tensor, weight: Tensor, residual: Tensor, ops: Counting) -> Tensor:
    return ops.linear(x, weight, None, residual)


def _exit_head(x: Tensor, norm: Tensor, weight: Tensor, ops: Counting) -> Any:
    return ops.exit_head(x, norm, weight, EPS)


def exit_heads(shape: Shape, x: Tensor, norm: Tensor) -> Iterator[Case]:
    """The exit head with a head in the states' dtype, and with an int8 one."""
    head, scale = (shape.tensor(shape.vocabulary, shape.hidden), shape.tensor(shape.vocabulary, dtype=torch.float32))
    narrow, token_map = shape.tensor(shape.vocabulary, shape.hidden, dtype=torch.int8), torch.arange(shape.vocabulary)
    out = len(x) * (8 + 4 + 4)  # token, logit, log-sum-exp
    yield "exit_head", size(x, norm, head) + out, lambda ops: ops.exit_head(x, norm, head, EPS)
    yield (
        "exit_head, int8 and token_map",
        size(x, norm, narrow, scale) + 8 * len(x) + out,
        lambda ops: ops.exit_head(x, norm, narrow, EPS, token_map, scale),
    )


def accepting(drafted: int) -> Iterator[Case]:
    """The ops at the end of a round."""
    lengths, vocabulary = torch.tensor([COUNTED.length]), COUNTED.vocabulary
    draft, target = torch.zeros(1, drafted, dtype=torch.int64), torch.zeros(1, drafted + 1, dtype=torch.int64)
    yield "accept_greedy", size(draft, target) + 4 * 8, lambda ops: ops.accept_greedy(draft, target, lengths)
    logits = [COUNTED.tensor(1, rows, vocabulary, dtype=torch.float32) for rows in (drafted, drafted + 1)]
    options = (lengths, torch.ones(1), torch.ones(1, dtype=torch.int64))
    needed = size(draft, *logits, *options) + 3 * 8
    yield "accept_sampled", needed, lambda ops: ops.accept_sampled(draft, *logits, *options)


def counted() -> str:
    """Bytes moved, one line for each op and number of rows."""
    found = [(str(rows), measure(*case)) for rows in (1, 7) for case in cases(COUNTED, rows)]
    for many in (20, 40):  # of several sequences: what a block takes in one pass over its weights
        found += [(str(many), measure(*case)) for case in cases(COUNTED, many) if case[0] in SHARED]
    found += [("6 drafts", measure(*case)) for case in accepting(6)]
    lines = ["| op | rows | must move | from memory | written | moved / must | from L2 |", "|---" * 7 + "|"]
    for rows, row in found:
        cells = [f"`{row.name}`", rows, f"{row.needed:,}", f"{row.memory:,}", f"{row.written:,}", f"{row.ratio:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {row.l2:,} |")
    return "\n".join(lines)


def least() -> str:
    """Minimum bytes and time of each op in Llama-3.2-1B, one line each."""
    lines = ["| op, Llama-3.2-1B | MB, 1 row | least µs | MB, 7 rows | least µs |", "|---" * 5 + "|"]
    for (name, one, _), (_, seven, _) in zip(cases(LLAMA_1B, 1), cases(LLAMA_1B, 7), strict=True):
        cells = [f"{value / 1e6:.3f} | {value / H100 * 1e6:.2f}" for value in (one, seven)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Count, show, write."""
    parser = argparse.ArgumentParser(prog="python -m tools.roofline", description=__doc__)
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    args = parser.parse_args()
    text = f"{counted()}\n\n{least()}"
    print(text)
    if args.output is not None:
        args.output.write_text(f"{HEAD}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
