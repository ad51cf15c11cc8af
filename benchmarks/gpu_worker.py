"""Times ops of whichever `layerskip_kernels` can be imported, one at a time, as `benchmarks.gpu` asks for them.

It imports nothing else of this project, so that it serves an older version, too. It writes a line of JSON: where the
package is, and the names of its cases. Then, for each name that it reads, it writes the microseconds of a call, and two
numbers of what the call gives.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels as lk

EPS = 1e-5
COLD_BYTES = 256 << 20  # that calls read in a turn: no cache holds them
CALLS, REPLAYS = 96, 5
SIZES = {  # hidden, features, heads, key and value heads, head size, vocabulary
    "Llama-3.2-1B": (2048, 8192, 32, 8, 64, 128256),
    "Llama-3-8B": (4096, 14336, 32, 8, 128, 128256),
}
CONTEXTS = ((512, 1024), (8192, 8192 + 64), (512, 32768))  # tokens, and the capacity of the cache
Call = Callable[[], Tensor]


def copies(device: str, read: int, *size: int) -> list[Tensor]:
    """Copies of a tensor, enough that each call reads one that has left the cache."""
    first = torch.randn(size, device=device, dtype=torch.bfloat16) * size[-1] ** -0.5
    count = min(CALLS, max(1, COLD_BYTES // (2 * read)))
    return [first, *(first.clone() for _ in range(count - 1))]


def linear(device: str, sizes: tuple[int, ...], rows: int) -> list[Call]:
    hidden, _, heads, _, size, _ = sizes
    x = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    return [lambda w=w: lk.linear(x, w) for w in copies(device, heads * size * hidden, heads * size, hidden)]


def swiglu(device: str, sizes: tuple[int, ...], rows: int) -> list[Call]:
    hidden, features, *_ = sizes
    x = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    weights = copies(device, 2 * features * hidden, 2, features, hidden)
    return [lambda w=w: lk.swiglu(x, w[0], w[1]) for w in weights]


def exit_head(device: str, sizes: tuple[int, ...], rows: int) -> list[Call]:
    hidden, *_, vocabulary = sizes
    x = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
    norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    weights = copies(device, vocabulary * hidden, vocabulary, hidden)
    return [lambda w=w: torch.stack(lk.exit_head(x, norm, w, EPS)[1:]) for w in weights]


def attention(device: str, sizes: tuple[int, ...], length: int, capacity: int) -> list[Call]:
    _, _, heads, kv_heads, size, _ = sizes
    q = torch.randn(1, 1, heads, size, device=device, dtype=torch.bfloat16)
    lengths = torch.full((1,), length - 1, device=device)
    caches = copies(device, 2 * kv_heads * length * size, 2, 1, kv_heads, capacity, size)
    return [lambda c=c: lk.verify_attention(q, c[0], c[1], lengths) for c in caches]


def cases(models: dict[str, tuple[int, ...]], contexts: Any) -> Iterator[tuple[str, Callable[[str], list[Call]]]]:
    """By name what makes the calls of a case on a device, each on a copy of its weights."""
    for model, sizes in models.items():
        for rows in (1, 5):
            for make in (linear, swiglu, exit_head):
                yield f"{model} {make.__name__} R={rows}", lambda d, m=make, s=sizes, r=rows: m(d, s, r)
        for length, capacity in contexts:
            name = f"{model} verify_attention, {length} tokens of {capacity}"
            yield name, lambda d, s=sizes, n=length, c=capacity: attention(d, s, n, c)


def microseconds(calls: list[Call], device: str) -> float:
    """Of a call: on a GPU within a graph of many, as a decoding round is, each on another copy."""
    chosen = list(itertools.islice(itertools.cycle(calls), CALLS))
    if device == "cpu":
        started = time.perf_counter()
        for call in chosen:
            call()
        return (time.perf_counter() - started) / CALLS * 1e6
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in chosen:
            call()
    graph.replay()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(REPLAYS):
        graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / (REPLAYS * CALLS) * 1e3


def answer(device: str, make: Callable[[str], list[Call]]) -> dict[str, float]:
    """Time of a case, norm of its result, and the result's projection on a random direction."""
    torch.manual_seed(0)
    calls = make(device)
    given = calls[0]().double().flatten().cpu()
    direction = torch.randn(given.numel(), dtype=torch.float64)
    along = float(given @ direction / direction.norm())
    return {"microseconds": microseconds(calls, device), "norm": float(given.norm()), "along": along}


def main(device: str, backend: str, sizes: str = "", contexts: str = "") -> None:
    """Serve until there is nothing more to read; ``sizes`` and ``contexts`` are JSON in the place of the usual ones."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed
    known = dict(cases(json.loads(sizes) if sizes else SIZES, json.loads(contexts) if contexts else CONTEXTS))
    with torch.no_grad(), lk.use_backend(backend):
        print(json.dumps({"package": lk.__file__, "cases": list(known)}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(device, known[line.strip()])), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
