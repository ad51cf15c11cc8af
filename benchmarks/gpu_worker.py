"""Times ops of whichever `layerskip_kernels` can be imported, one at a time, as `benchmarks.gpu_before` asks for them.

It imports nothing else of this project, so that it serves an older version, too. It writes a line of JSON, the names of
its cases; then, for each name that it reads, the microseconds of a call, and a number that other versions must give.
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
COLD_BYTES = 256 << 20  # of copies of a weight, which no cache holds
CALLS, REPLAYS = 48, 5
SIZES = {  # hidden, features, heads, key and value heads, head size, vocabulary
    "Llama-3.2-1B": (2048, 8192, 32, 8, 64, 128256),
    "Llama-3-8B": (4096, 14336, 32, 8, 128, 128256),
}
CONTEXTS = ((512, 1024), (8192, 8192 + 64), (512, 131072))  # tokens, and the capacity of the cache
Call = Callable[[], Tensor]


def copies(device: str, *size: int) -> list[Tensor]:
    """So many equal weights that each is read from memory."""
    first = torch.randn(size, device=device, dtype=torch.bfloat16) * size[-1] ** -0.5
    count = min(CALLS, max(1, COLD_BYTES // (2 * first.numel())))
    return [first, *(first.clone() for _ in range(count - 1))]


def cases(device: str, name: str, sizes: tuple[int, ...], contexts: Any = CONTEXTS) -> Iterator[tuple[str, list[Call]]]:
    """By name the calls of a case, each on a copy of its weights."""
    hidden, features, heads, kv_heads, size, vocabulary = sizes
    norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    for rows in (1, 5):
        x = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)
        weights = copies(device, heads * size, hidden)
        yield f"{name} linear R={rows}", [lambda w=w, x=x: lk.linear(x, w) for w in weights]
        gates = copies(device, 2, features, hidden)
        yield f"{name} swiglu R={rows}", [lambda w=w, x=x: lk.swiglu(x, w[0], w[1]) for w in gates]
        head = copies(device, vocabulary, hidden)
        yield f"{name} exit_head R={rows}", [lambda w=w, x=x: lk.exit_head(x, norm, w, EPS)[2] for w in head]
    for length, capacity in contexts:
        q = torch.randn(1, 1, heads, size, device=device, dtype=torch.bfloat16)
        cache = copies(device, 2, 1, kv_heads, capacity, size)
        lengths = torch.full((1,), length - 1, device=device)
        calls = [lambda c=c, q=q, n=lengths: lk.verify_attention(q, c[0], c[1], n) for c in cache]
        yield f"{name} verify_attention, {length} tokens of {capacity}", calls


def microseconds(calls: list[Call], device: str) -> float:
    """Of a call: on a card within a graph of many, as a decoding round is, each on another copy."""
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


def answer(device: str, name: str, sizes: dict[str, tuple[int, ...]], contexts: Any) -> dict[str, float]:
    """The time of a case, whose weights are made for it alone, and the mean size of what it gives."""
    torch.manual_seed(0)
    model = next(model for model in sizes if name.startswith(model + " "))
    calls = next(calls for found, calls in cases(device, model, sizes[model], contexts) if found == name)
    return {"microseconds": microseconds(calls, device), "size": float(calls[0]().float().abs().mean())}


def main(device: str, backend: str, sizes: str = "", contexts: str = "") -> None:
    """Serve until there is nothing more to read; ``sizes`` and ``contexts`` are JSON in the place of the usual ones."""
    models: dict[str, tuple[int, ...]] = json.loads(sizes) if sizes else SIZES
    lengths = json.loads(contexts) if contexts else CONTEXTS
    with torch.no_grad(), lk.use_backend(backend):
        meta = [found for model in models for found, _ in cases("meta", model, models[model], lengths)]
        print(json.dumps(meta), flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(device, line.strip(), models, lengths)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
