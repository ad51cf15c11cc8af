"""``python -m benchmarks.gpu``: the tests marked gpu, then every backend on a card, as one JSON.

After the tests, ops of this version and of an older one take turns (`benchmarks.gpu_before`; ``--before`` names the
older one). Micro-benchmarks are fractions of the copy bandwidth measured in the same run. Each case is captured in a
CUDA graph, as a decoding round is; sessions are timed with and without theirs. Weights are random; decoding takes a
fixed number of accepted tokens a round, so it measures time, not agreement. Without a card it says so and exits with 2;
from red tests it reports nothing and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip import SelfSpeculativeDecoder
from layerskip._files import write_atomically
from layerskip.decoding import cuda_graphs
from layerskip.decoding.session import Session
from layerskip_kernels import reference

from .gpu_before import BEFORE, before_and_after
from .gpu_model import EPS, LLAMA_1B, LLAMA_8B, Model
from .rounds import round_cases
from .sanitize import sanitize

NO_CARD, RED_TESTS, DIFFERENT = 2, 1, 4
BACKENDS = ("cuda", "triton", "reference")
# Goals on an H100, as fractions of its copy bandwidth.
EXIT_HEAD_GOAL, FORWARD_GOAL, VERIFY_GOAL = 0.90, 0.65, 1.15


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
        for backend in BACKENDS:
            run = on_backend(backend, lambda args=args: lk.exit_head(*args))
            yield measure(what, backend, run, read, bandwidth, f">= {EXIT_HEAD_GOAL:.0%} of the copy bandwidth")
        yield measure(what, "torch eager", lambda args=args: _torch_exit(*args), read, bandwidth)
        yield measure(what, "torch.compile", lambda args=args: compiled(*args), read, bandwidth)


def _torch_exit(hidden: Tensor, norm: Tensor, head: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(F.rms_norm(hidden, norm.shape, norm, eps), head).float()
    return logits.argmax(-1), logits.logsumexp(-1)


def forward_cases(model: Model, bandwidth: float) -> Iterator[Result]:
    """All layers at M = 1 and at M = K + 1, on every backend."""
    for backend in BACKENDS:
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


def sampling_cases(model: Model, bandwidth: float) -> Iterator[Result]:
    """What drawing costs: a head with noise, a head that writes its logits, and acceptance of K drafts."""
    shape, name = model.shape, model.shape.name
    rows, read = shape.draft + 1, model.head.numel() * model.head.element_size()
    hidden, logits = model.random(rows, shape.hidden), torch.empty(rows, shape.vocabulary, device=model.device)
    draft = torch.zeros(1, shape.draft, dtype=torch.int64, device=model.device)
    target = torch.randn(1, rows, shape.vocabulary, device=model.device)
    offset = torch.arange(rows, device=model.device)

    def drawn() -> Any:
        return lk.exit_head(hidden[:1], model.norm, model.head, EPS, None, None, *model.noise(), offset[:1])

    def written() -> Any:
        return lk.exit_head(hidden, model.norm, model.head, EPS, logits=logits)

    def accepted() -> Any:
        return lk.accept_sampled(draft, target[:, 1:], target, model.lengths.clone(), *model.noise())

    for backend in BACKENDS:
        yield measure(f"{name} exit_head R=1, drawn", backend, on_backend(backend, drawn), read, bandwidth)
        what = f"{name} exit_head R={rows}, logits written"
        yield measure(what, backend, on_backend(backend, written), read + logits.numel() * 4, bandwidth)
        what = f"{name} accept_sampled K={shape.draft}"
        yield measure(what, backend, on_backend(backend, accepted), (2 * rows - 1) * shape.vocabulary * 4, bandwidth)


def decode_cases(model: Model) -> Iterator[Result]:
    """Tokens a second, autoregressively and with 0, half or all of the draft accepted, greedily and drawn."""
    token = torch.zeros(1, dtype=torch.int64, device=model.device)
    drafted, name = model.shape.draft, model.shape.name
    for backend in BACKENDS:
        for how, noise in (("greedy", None), ("drawn", model.noise())):
            try:
                step = milliseconds(on_backend(backend, lambda noise=noise: model.step(token, noise)))
                round_ = milliseconds(on_backend(backend, lambda noise=noise: model.round(token, noise)))
            except lk.BackendError as error:
                yield Result(f"{name} decode, {how}", backend, float("nan"), unit="tokens/s", skipped=str(error))
                continue
            yield Result(f"{name} autoregressive, {how}", backend, 1e3 / step, unit="tokens/s")
            for accepted in (0, drafted // 2, drafted):
                what = f"{name} self-speculative E={model.shape.exit_layer} K={drafted}, {how}, {accepted} accepted"
                yield Result(what, backend, 1e3 * (accepted + 1) / round_, unit="tokens/s")


def small_head_cases(model: Model, bandwidth: float) -> Iterator[Result]:
    """Rounds that draft with a part of the head in int8."""

    def time(what: str, backend: str, call: Callable[[], Any], goal: str) -> Result:
        return measure(what, backend, on_backend(backend, call), 0, bandwidth, goal)

    yield from round_cases(model, time)


def session_cases(model: Model, batches: tuple[int, ...] = (1, 8), steps: int = 20) -> Iterator[Result]:
    """Wall time of a session's step, host and all: with its rounds as graphs and with rounds that are called."""
    shape = model.shape
    decoder = SelfSpeculativeDecoder(model.decoder_model(), shape.exit_layer, shape.draft)
    for batch in batches:
        for strategy in ("autoregressive", "self_speculative"):
            for how, graphs in (("graphs", cuda_graphs.for_device(decoder.model.device)), ("called", None)):
                taken = _step_seconds(decoder, batch, strategy, graphs, steps)
                yield Result(f"{shape.name} session, {strategy}, B={batch}, {how}", "automatic", taken * 1e6)


def _step_seconds(
    decoder: SelfSpeculativeDecoder, batch: int, strategy: str, graphs: cuda_graphs.Graphs | None, steps: int
) -> float:
    """Median of ``steps`` steps, after those that read prompts, compile and record."""
    most = (steps + 4) * (decoder.num_speculations + 1)
    cache = decoder.model.decoder.new_cache(batch, 16 + most + decoder.num_speculations + 1)
    session = Session(
        decoder.model, cache, decoder.defaults, decoder.controller, 16 + most, decoder.num_speculations, graphs=graphs
    )
    for _ in range(batch):
        session.add(list(range(16)), most, strategy=strategy, eos_token_id=[])
    times = []
    for _ in range(steps + 3):
        started = time.perf_counter()
        session.step()  # ends with the tokens on the host
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


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
    return {
        "card": properties.name, "multiprocessors": properties.multi_processor_count, "driver": driver(), **versions
    }  # fmt: skip


def driver() -> str:
    """The version of the driver, as nvidia-smi says it, which comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


def main(argv: list[str] | None = None) -> int:
    """Test, measure, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--skip-tests", action="store_true", help="the report then says that nothing was tested")
    parser.add_argument("--sanitize", action="store_true", help="only run the CUDA tests under compute-sanitizer")
    parser.add_argument("--before", default=BEFORE, help="a commit, or a folder with the version that is built there")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"No CUDA card: torch {torch.__version__} sees none, so there is nothing to measure.", file=sys.stderr)
        return NO_CARD
    if args.sanitize:
        return sanitize()
    if not args.skip_tests and run_tests() != 0:
        print("The tests marked gpu fail, so no figure is reported.", file=sys.stderr)
        return RED_TESTS
    older = before_and_after(args.before)
    bandwidth = copy_bandwidth()
    results: list[Result] = []
    for shape in (LLAMA_1B, LLAMA_8B):
        model = Model(shape, "cuda")
        for cases in (
            exit_head_cases(model, bandwidth), sampling_cases(model, bandwidth), forward_cases(model, bandwidth),
            decode_cases(model), small_head_cases(model, bandwidth), session_cases(model), loss_cases(model),
        ):  # fmt: skip
            for result in cases:
                print(result, flush=True)
                results.append(result)
        del model
        torch.cuda.empty_cache()
    report = {
        "card": card(), "tested": not args.skip_tests, "copy_bandwidth_gb_s": bandwidth / 1e9,
        "before": older, "results": [asdict(result) for result in results],
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, (json.dumps(report, indent=2) + "\n").encode())
    print(f"wrote {args.output}")
    different = [row["what"] for row in older["rows"] if not row["same"]]
    if different:
        print(f"the older version gives other results: {', '.join(different)}", file=sys.stderr)
    return DIFFERENT if different else 0


if __name__ == "__main__":
    sys.exit(main())
