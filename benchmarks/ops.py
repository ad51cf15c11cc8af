"""The CPU ops against the memory's speed and against torch's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import layerskip_kernels as lk
from layerskip_kernels.bundles import REQUIRED_WEIGHTS, layer_shapes

from .harness import Case, Result, interleave

DTYPE = torch.bfloat16
EPS = 1e-5
HEADS = ((49152, 576), (128256, 2048))  # SmolLM2-135M, Llama-3.2-1B
ROWS = 6  # one round of five drafts
DRAFT_ROWS = 8192


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def exit_head(repeats: int) -> Iterator[Result]:
    """The full head for one row and for six, torch's way for one, and the reduced int8 draft head."""
    for vocabulary, width in HEADS:
        weight = torch.randn(vocabulary, width).to(DTYPE)
        norm = torch.ones(width, dtype=DTYPE)
        one, six = torch.randn(1, width).to(DTYPE), torch.randn(ROWS, width).to(DTYPE)
        draft = torch.randint(-127, 128, (DRAFT_ROWS, width), dtype=torch.int8)
        scale, tokens = torch.rand(DRAFT_ROWS), torch.randperm(vocabulary)[:DRAFT_ROWS].sort().values
        draws = torch.full((1,), 0.7), torch.tensor([3]), torch.tensor([100])
        cases = [
            Case("one", lambda: lk.exit_head(one, norm, weight, EPS), _bytes(weight)),
            Case("six", lambda: lk.exit_head(six, norm, weight, EPS), _bytes(weight)),
            Case("torch", lambda: F.linear(F.rms_norm(one, (width,), norm, EPS), weight).argmax(-1)),
            Case("int8", lambda: lk.exit_head(one, norm, draft, EPS, tokens, scale), _bytes(draft)),
            Case("sampled", lambda: lk.exit_head(one, norm, weight, EPS, None, None, *draws), _bytes(weight)),
        ]
        shape = f"{vocabulary}x{width}"
        bandwidth = interleave(cases, repeats, f"exit_head {shape}")
        yield Result("read bandwidth meanwhile", bandwidth, "GB/s")
        full, rows, torch_head, int8, sampled = cases
        share = full.bandwidth / bandwidth
        faster = torch_head.median / full.median
        yield Result(f"exit_head {shape} R=1", full.median * 1e3, "ms")
        yield Result(f"exit_head {shape} R=1, of the read bandwidth", share, "", ">= 0.85", share >= 0.85)
        yield Result(f"exit_head {shape} R=1, torch's time over ours", faster, "x", ">= 2.5", faster >= 2.5)
        more = rows.median / full.median
        yield Result(f"exit_head {shape} R={ROWS} over R=1", more, "x", "<= 1.35", more <= 1.35)
        yield Result(f"exit_head {shape} R=1, sampled over greedy", sampled.median / full.median, "x")
        reduced = int8.median / full.median
        goal = "<= 0.12" if vocabulary == HEADS[0][0] else ""
        yield Result(
            f"int8 head of {DRAFT_ROWS} rows over {shape}", reduced, "x", goal, reduced <= 0.12 if goal else None
        )


def linear(repeats: int) -> Iterator[Result]:
    """A matrix of 50 MB and more, one row and six, ours and torch's."""
    for out_width, in_width in ((49152, 576), (8192, 4096)):
        weight = torch.randn(out_width, in_width).to(DTYPE)
        one, six = torch.randn(1, in_width).to(DTYPE), torch.randn(ROWS, in_width).to(DTYPE)
        cases = [
            Case("one", lambda: lk.linear(one, weight), _bytes(weight)),
            Case("six", lambda: lk.linear(six, weight), _bytes(weight)),
            Case("torch one", lambda: F.linear(one, weight)),
            Case("torch six", lambda: F.linear(six, weight)),
        ]
        shape = f"{out_width}x{in_width}"
        bandwidth = interleave(cases, repeats, f"linear {shape}")
        yield Result("read bandwidth meanwhile", bandwidth, "GB/s")
        ours, six_rows, torch_one, torch_six = cases
        yield Result(f"linear {shape} R=1, of the read bandwidth", ours.bandwidth / bandwidth, "")
        more = six_rows.median / ours.median
        yield Result(f"linear {shape} R={ROWS} over R=1", more, "x", "<= 1.35", more <= 1.35)
        yield Result(f"linear {shape} R=1, torch's time over ours", torch_one.median / ours.median, "x")
        yield Result(f"linear {shape} R={ROWS}, torch's time over ours", torch_six.median / six_rows.median, "x")


def partial_forward(repeats: int) -> Iterator[Result]:
    """All layers of SmolLM2-135M's shape: one row, seven rows, and the first four layers alone."""
    layers, width, num_kv_heads, head_dim, capacity, past = 30, 576, 3, 64, 512, 200
    shapes = layer_shapes(width, 9, num_kv_heads, head_dim, 1536)
    norm = torch.ones(width, dtype=DTYPE)
    weights = []
    for _ in range(layers):
        for shape in (shapes[name] for name in REQUIRED_WEIGHTS):
            weights.append(norm if len(shape) == 1 else (torch.randn(shape) / shape[1] ** 0.5).to(DTYPE))
    k_cache = torch.randn(layers, 1, num_kv_heads, capacity, head_dim).to(DTYPE)
    v_cache = torch.randn_like(k_cache)
    cos, sin, lengths = torch.ones(capacity, head_dim // 2), torch.zeros(capacity, head_dim // 2), torch.tensor([past])
    cache = lk.KVCache(k_cache, v_cache, cos, sin, lengths)

    def case(name: str, rows: int, end: int) -> Case:
        hidden, own = torch.randn(1, rows, width).to(DTYPE), weights[: len(REQUIRED_WEIGHTS) * end]
        return Case(
            name,
            lambda: lk.partial_forward(hidden, own, cache, 0, end, EPS),
            sum(map(_bytes, own)),
        )

    cases = [case("one", 1, layers), case("seven", 7, layers), case("four layers", 1, 4)]
    bandwidth = interleave(cases, repeats, "partial_forward")
    yield Result("read bandwidth meanwhile", bandwidth, "GB/s")
    one, seven, four = cases
    yield Result("partial_forward SmolLM2-135M M=1", one.median * 1e3, "ms")
    yield Result("partial_forward SmolLM2-135M M=1, of the read bandwidth", one.bandwidth / bandwidth, "")
    yield Result("partial_forward SmolLM2-135M M=7 over M=1", seven.median / one.median, "x")
    yield Result("partial_forward SmolLM2-135M layers [0, 4)", four.median * 1e3, "ms")


PEAK_PROGRAM = """
import resource, torch, layerskip_kernels as lk
weight = torch.ones(128256, 64, dtype=torch.bfloat16)
norm, hidden = torch.ones(64, dtype=torch.bfloat16), torch.ones(8, 64, dtype=torch.bfloat16)
lk.exit_head(hidden[:1], norm, weight[:64], 1e-5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lk.exit_head(hidden, norm, weight, 1e-5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_memory() -> Iterator[Result]:
    """What the head adds to a process' peak memory for 8 rows of 128256 logits, which would be 4 MB in fp32."""
    program = subprocess.run([sys.executable, "-c", PEAK_PROGRAM], capture_output=True, text=True, check=True)
    kibibytes = int(program.stdout)
    yield Result("exit_head V=128256 R=8, growth of peak memory", kibibytes, "KiB", "<= 400", kibibytes <= 400)
