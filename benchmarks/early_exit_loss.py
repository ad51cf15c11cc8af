"""Time and peak memory of `early_exit_loss`, forward and backward, against torch's cross-entropy on whole logits.

    python -m benchmarks.early_exit_loss [--quick] [--dtype bfloat16] [--threads 2] [--output FILE]

All cases take 40 minutes and about 12 GB on two cores, ``--quick`` takes a minute.

torch's side is what transformers does: norm, one linear for each exit, `F.cross_entropy` on its logits in fp32,
weighted sum, backward. Rounds alternate between the two, medians are reported. Memory is the peak of what the allocator
holds above the start, less the gradients, which both must return.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels
from layerskip._files import write_atomically

from . import harness

EPS = 1e-5


class Case(NamedTuple):
    """N exits, R rows, D hidden, V vocabulary, and whether the head is trained."""

    exits: int
    rows: int
    hidden: int
    vocabulary: int
    frozen: bool


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hiddens = normal(case.exits, case.rows, case.hidden).requires_grad_()
    norm = torch.ones(case.hidden, dtype=dtype).requires_grad_()
    head = normal(case.vocabulary, case.hidden).mul_(0.05).requires_grad_(not case.frozen)
    labels = torch.randint(case.vocabulary, (case.rows,), generator=generator)
    return hiddens, norm, head, labels, torch.full((case.exits,), 1 / case.exits)


def fused(hiddens: Tensor, norm: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return layerskip_kernels.early_exit_loss(hiddens, norm, head, labels, weights, EPS).loss


def materialised(hiddens: Tensor, norm: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    normed = F.rms_norm(hiddens, norm.shape, norm, EPS)
    losses = [F.cross_entropy(F.linear(one, head).float(), labels) for one in normed]
    return (torch.stack(losses) * weights).sum()


def step(loss: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> float:
    """Seconds of one forward and backward."""
    for argument in arguments:
        argument.grad = None
    start = time.perf_counter()
    loss(*arguments).backward()
    return time.perf_counter() - start


def peak_bytes(loss: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> int:
    """Peak of what one step allocates on the CPU, without the gradients that it returns."""
    for argument in arguments:
        argument.grad = None
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss(*arguments).backward()
    held = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - sum(argument.grad.nbytes for argument in arguments if argument.grad is not None)


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Medians of alternating rounds, and the peaks."""
    arguments = inputs(case, dtype)
    sides = {"fused": fused, "torch": materialised}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, loss in sides.items():
            elapsed = step(loss, arguments)
            if round_:  # the first warms up
                seconds[name].append(elapsed)
    result = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return {**result, **{f"{name}_mb": peak_bytes(loss, arguments) / 1e6 for name, loss in sides.items()}}


def cases(quick: bool) -> list[Case]:
    sizes = [(576, 49152)] if quick else [(576, 49152), (2048, 128256)]
    rows = (512,) if quick else (512, 2048)
    return [Case(n, r, d, v, frozen) for d, v in sizes for r in rows for n in (1, 4, 8) for frozen in (True, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.dtype}, {args.threads} threads\n")
    print("| N | R | D | V | head | torch ms | fused ms | time | torch MB | fused MB | memory |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    records = []
    for case in cases(args.quick):
        result = measure(case, getattr(torch, args.dtype), args.rounds)
        head = "frozen" if case.frozen else "trained"
        time_ratio, memory_ratio = result["fused_s"] / result["torch_s"], result["torch_mb"] / result["fused_mb"]
        print(
            f"| {case.exits} | {case.rows} | {case.hidden} | {case.vocabulary} | {head} "
            f"| {result['torch_s'] * 1e3:.0f} | {result['fused_s'] * 1e3:.0f} | {time_ratio:.2f}× "
            f"| {result['torch_mb']:.0f} | {result['fused_mb']:.1f} | 1/{memory_ratio:.0f} |",
            flush=True,
        )
        records.append({**case._asdict(), **result})
        if args.output:  # after every case: a run cut short leaves what it has
            report = {"machine": harness.machine(), "dtype": args.dtype, "rounds": args.rounds, "cases": records}
            write_atomically(args.output, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
