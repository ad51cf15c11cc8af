"""``python -m benchmarks.gpu``: the tests marked gpu, then every backend on a card, as one JSON.

Micro-benchmarks are fractions of the copy bandwidth measured in the same run. Each case is captured in a CUDA graph
where its backend allows, as a decoding round is. Weights are random; decoding takes a fixed number of accepted tokens a
round, so it measures time, not agreement. Without a card it says so and exits with 2; from red tests it reports nothing
and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip._files import write_atomically
from layerskip_kernels import reference

NO_CARD, RED_TESTS = 2, 1
EPS = 1e-5
CACHE_CAPACITY, CACHE_LENGTH = 1024, 512
# Goals on an H100, as fractions of its copy bandwidth.
EXIT_HEAD_GOAL, FORWARD_GOAL, VERIFY_GOAL = 0.90, 0.65, 1.15


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and where it exits."""

    name: str
    layers: int
    hidden: int
    features: int
    heads: int
    groups: int
    size: int
    vocabulary: int
    exit_layer: int
    draft: int


LLAMA_1B = Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, 4, 6)
LLAMA_8B = Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256, 8, 6)


@dataclass(frozen=True)
class Result:
    """One line of the report; ``value`` is microseconds or tokens a second, ``fraction`` of the copy bandwidth."""

    what: str
    backend: str
    value: float
    unit: str = "us"
    fraction: float | None = None
    goal: str = ""
    skipped: str = ""


class Model:
    """Random weights of a shape, and a cache of one sequence."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        queries, keys = shape.heads * shape.size, shape.groups * shape.size
        width, features = shape.hidden, shape.features
        sizes = [
            (width,), (queries, width), (keys, width), (keys, width), (width, queries), (width,), (features, width),
            (features, width), (width, features),
        ]  # fmt: skip
        self.weights = [self.random(*size) for _ in range(shape.layers) for size in sizes]
        self.norm, self.head = self.random(width), self.random(shape.vocabulary, width)
        cache = (shape.layers, 1, shape.groups, CACHE_CAPACITY, shape.size)
        self.keys, self.values = self.random(*cache), self.random(*cache)
        angle = torch.outer(
            torch.arange(CACHE_CAPACITY), 10000.0 ** (-torch.arange(0, shape.size, 2) / shape.size)
        ).float()
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)
        self.lengths = torch.full((1,), CACHE_LENGTH, dtype=torch.int64, device=device)

    def random(self, *size: int) -> Tensor:
        """Normal entries of a weight's usual size."""
        return torch.randn(size, device=self.device, dtype=self.dtype) * size[-1] ** -0.5

    def forward(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """Layers [start, end), as `layerskip_kernels.partial_forward`."""
        per_layer = len(self.weights) // self.shape.layers
        weights = self.weights[start * per_layer : end * per_layer]
        lengths, caches = self.lengths, (self.keys, self.values)
        return lk.partial_forward(hidden, weights, *caches, self.cos, self.sin, lengths, start, end, EPS)

    def choose(self, hidden: Tensor) -> Tensor:
        """The head's choice for every row."""
        return lk.exit_head(hidden.reshape(-1, self.shape.hidden), self.norm, self.head, EPS).token

    def embed(self, tokens: Tensor) -> Tensor:
        """[n] -> [1, n, D], through the tied head."""
        return F.embedding(tokens.clamp(0), self.head).view(1, -1, self.shape.hidden)

    def layer_bytes(self, start: int, end: int) -> int:
        """What layers [start, end) must read at least."""
        per_layer = len(self.weights) // self.shape.layers
        weights = self.weights[start * per_layer : end * per_layer]
        return sum(weight.numel() * weight.element_size() for weight in weights)


def autoregressive_step(model: Model, token: Tensor) -> Tensor:
    """One token through all layers; the length stays, so that every replay does the same."""
    return model.choose(model.forward(model.embed(token), 0, model.shape.layers))


def self_speculative_round(model: Model, token: Tensor) -> lk.Acceptance:
    """Draft K tokens with E layers, run layers [0, E) for the last, verify K + 1 rows, accept; the length stays."""
    shape, states, drafts = model.shape, [], []
    for _ in range(shape.draft):
        states.append(model.forward(model.embed(token), 0, shape.exit_layer))
        token = model.choose(states[-1])
        drafts.append(token)
        model.lengths += 1
    states.append(model.forward(model.embed(token), 0, shape.exit_layer))
    model.lengths -= shape.draft
    target = model.choose(model.forward(torch.cat(states, 1), shape.exit_layer, shape.layers))
    lengths = model.lengths.clone()  # accepted for its time; the synthetic acceptance is counted, not taken from it
    return lk.accept_greedy(torch.stack(drafts, 1), target[None], lengths)


def milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """Mean time of a replay of ``run`` as a CUDA graph; eagerly where it cannot be captured."""
    for _ in range(3):
        run()  # compiles and tunes, neither of which may happen in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        graph.replay()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeats


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / (milliseconds(lambda: target.copy_(source)) * 1e-3)


def on_backend(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` on one backend, without gradients."""

    def call() -> Any:
        with torch.no_grad(), lk.use_backend(backend):
            return run()

    return call


def measure(what: str, backend: str, run: Callable[[], Any], read: int, bandwidth: float, goal: str = "") -> Result:
    """Time one case; a backend that does not serve it is a line with the reason, not a failure."""
    try:
        time = milliseconds(run)
    except lk.BackendError as error:
        return Result(what, backend, float("nan"), skipped=str(error))
    return Result(what, backend, time * 1e3, fraction=read / (time * 1e-3) / bandwidth if read else None, goal=goal)


def exit_head_cases(model: Model, bandwidth: float) -> Iterator[Result]:
    """R = 1…8 on every backend, and torch's eager and compiled code for the same."""
    compiled = torch.compile(reference.exit_head_ref)
    for rows in (1, 2, 4, 8):
        hidden = model.random(rows, model.shape.hidden)
        args = (hidden, model.norm, model.head, EPS)
        read = model.head.numel() * model.head.element_size()
        what = f"{model.shape.name} exit_head R={rows}"
        for backend in ("cuda", "triton", "reference"):
            run = on_backend(backend, lambda args=args: lk.exit_head(*args))
            yield measure(what, backend, run, read, bandwidth, f">= {EXIT_HEAD_GOAL:.0%} of the copy bandwidth")
        yield measure(what, "torch eager", lambda args=args: _torch_exit(*args), read, bandwidth)
        yield measure(what, "torch.compile", lambda args=args: compiled(*args), read, bandwidth)


def _torch_exit(hidden: Tensor, norm: Tensor, head: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(F.rms_norm(hidden, norm.shape, norm, eps), head).float()
    return logits.argmax(-1), logits.logsumexp(-1)


def forward_cases(model: Model, bandwidth: float) -> Iterator[Result]:
    """All layers at M = 1 and at M = K + 1, on every backend."""
    for backend in ("cuda", "triton", "reference"):
        for rows in (1, model.shape.draft + 1):
            hidden = model.random(1, rows, model.shape.hidden)
            run = on_backend(backend, lambda hidden=hidden: model.forward(hidden, 0, model.shape.layers))
            goal = f">= {FORWARD_GOAL:.0%} of the copy bandwidth" if rows == 1 else f"<= {VERIFY_GOAL} x M=1"
            what = f"{model.shape.name} partial_forward M={rows}"
            yield measure(what, backend, run, model.layer_bytes(0, model.shape.layers), bandwidth, goal)


def _loss_functions() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Ways to the cross-entropy of a head: this library's, torch's, and others where they are installed."""
    yield "triton", lambda x, norm, head, labels: lk.early_exit_loss(x, norm, head, labels, x.new_ones(1).float()).loss

    def torch_loss(x: Tensor, norm: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.rms_norm(x[0], norm.shape, norm, EPS), head).float(), labels)

    yield "torch eager", torch_loss
    yield "torch.compile", torch.compile(torch_loss)
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        yield (
            "cut-cross-entropy",
            lambda x, norm, head, labels: linear_cross_entropy(F.rms_norm(x[0], norm.shape, norm, EPS), head, labels),
        )
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        yield "liger", lambda x, norm, head, labels: liger(head, F.rms_norm(x[0], norm.shape, norm, EPS), labels)


def loss_cases(model: Model, rows: int = 2048) -> Iterator[Result]:
    """Forward and backward of one exit's loss, with its peak memory."""
    labels = torch.randint(0, model.shape.vocabulary, (rows,), device=model.device)
    leaves = [
        tensor.detach().clone().requires_grad_()
        for tensor in (model.random(1, rows, model.shape.hidden), model.norm, model.head)
    ]
    for name, loss in _loss_functions():
        backend = name if name == "triton" else None

        def step(loss: Callable[..., Tensor] = loss, backend: str | None = backend) -> None:
            with lk.use_backend(backend):
                torch.autograd.grad(loss(*leaves, labels), leaves)

        what = f"{model.shape.name} early_exit_loss R={rows}, forward and backward"
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        yield Result(what, name, _eager_milliseconds(step) * 1e3)
        yield Result(f"{what}, peak memory", name, peak, unit="MiB")


def _eager_milliseconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """A training step is not captured."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeats


def decode_cases(model: Model) -> Iterator[Result]:
    """Tokens a second, autoregressively and with 0, half or all of the draft accepted."""
    token = torch.zeros(1, dtype=torch.int64, device=model.device)
    drafted, name = model.shape.draft, model.shape.name
    for backend in ("cuda", "triton", "reference"):
        try:
            step = milliseconds(on_backend(backend, lambda: autoregressive_step(model, token)))
            round_ = milliseconds(on_backend(backend, lambda: self_speculative_round(model, token)))
        except lk.BackendError as error:
            yield Result(f"{name} decode", backend, float("nan"), unit="tokens/s", skipped=str(error))
            continue
        yield Result(f"{name} autoregressive", backend, 1e3 / step, unit="tokens/s")
        for accepted in (0, drafted // 2, drafted):
            what = f"{name} self-speculative E={model.shape.exit_layer} K={drafted}, {accepted} accepted"
            yield Result(what, backend, 1e3 * (accepted + 1) / round_, unit="tokens/s")


def run_tests() -> int:
    """The tests marked gpu: a figure from a kernel that is wrong is worth nothing."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(root / "tests")]
    return subprocess.run(command, cwd=root).returncode


def card() -> dict[str, Any]:
    """What a figure depends on."""
    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if find_spec("triton"):
        import triton

        versions["triton"] = triton.__version__
    return {"card": properties.name, "multiprocessors": properties.multi_processor_count, **versions}


def main(argv: list[str] | None = None) -> int:
    """Test, measure, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--skip-tests", action="store_true", help="the report then says that nothing was tested")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"No CUDA card: torch {torch.__version__} sees none, so there is nothing to measure.", file=sys.stderr)
        return NO_CARD
    if not args.skip_tests and run_tests() != 0:
        print("The tests marked gpu fail, so no figure is reported.", file=sys.stderr)
        return RED_TESTS
    bandwidth = copy_bandwidth()
    results: list[Result] = []
    for shape in (LLAMA_1B, LLAMA_8B):
        model = Model(shape, "cuda")
        for cases in (
            exit_head_cases(model, bandwidth), forward_cases(model, bandwidth), decode_cases(model), loss_cases(model)
        ):  # fmt: skip
            for result in cases:
                print(result, flush=True)
                results.append(result)
        del model
        torch.cuda.empty_cache()
    report = {
        "card": card(), "tested": not args.skip_tests, "copy_bandwidth_gb_s": bandwidth / 1e9,
        "results": [asdict(result) for result in results],
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, (json.dumps(report, indent=2) + "\n").encode())
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
