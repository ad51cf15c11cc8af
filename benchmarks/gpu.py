"""``python -m benchmarks.gpu``: the tests marked gpu, then every backend on a GPU, as one JSON.

After the tests, ops of this version and of an older one take turns (``--before`` names the older
one). Micro-benchmarks are fractions of the copy bandwidth measured in the same run. Each case is captured in a
CUDA graph, as a decoding round is; sessions are timed with and without theirs. Weights are random; decoding takes a
fixed number of accepted tokens a round, so it measures time, not agreement. Without a GPU it says so and exits with 2;
from red tests it reports nothing and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip import SelfSpeculativeDecoder
from layerskip._files import write_atomically
from layerskip.decoding import cuda_graphs
from layerskip.decoding.session import Session
from layerskip.models import EarlyExitHead, LayerSkipModel, PartialDepthDecoder
from layerskip_kernels import LayerWeights, reference
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, layer_shapes

EPS = 1e-5
CACHE_CAPACITY, CACHE_LENGTH = 1024, 512
PER_LAYER = len(REQUIRED_WEIGHTS)  # tensors of a layer


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


class Model:
    """Random weights of a shape, and a cache of one sequence."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        shapes = layer_shapes(shape.hidden, shape.heads, shape.groups, shape.size, shape.features)
        self.weights = [self.random(*shapes[name]) for _ in range(shape.layers) for name in REQUIRED_WEIGHTS]
        self.norm, self.head = self.random(shape.hidden), self.random(shape.vocabulary, shape.hidden)
        cache = (shape.layers, 1, shape.groups, CACHE_CAPACITY, shape.size)
        self.keys, self.values = self.random(*cache), self.random(*cache)
        self.frequencies = 10000.0 ** (-torch.arange(0, shape.size, 2) / shape.size)
        angle = torch.outer(torch.arange(CACHE_CAPACITY), self.frequencies).float()
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)
        self.lengths = torch.full((1,), CACHE_LENGTH, dtype=torch.int64, device=device)

    def random(self, *size: int) -> Tensor:
        """Normal entries of a weight's usual size."""
        return torch.randn(size, device=self.device, dtype=self.dtype) * size[-1] ** -0.5

    def noise(self, rows: int = 1) -> lk.Noise:
        """A temperature of 0.8 and a seed for each row."""
        seed = torch.arange(rows, device=self.device)
        return lk.Noise(torch.full((rows,), 0.8, device=self.device), seed)

    @property
    def cache(self) -> lk.KVCache:
        """Keys and values with the lengths, which no call advances."""
        return lk.KVCache(self.keys, self.values, self.cos, self.sin, self.lengths)

    def forward(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """Layers [start, end), as `layerskip_kernels.partial_forward`."""
        weights = self.weights[start * PER_LAYER : end * PER_LAYER]
        return lk.partial_forward(hidden, weights, self.cache, start, end, EPS)

    def step(self, token: Tensor, noise: lk.Noise | None = None) -> Tensor:
        """One token through all layers, greedily or drawn; the length stays, so that every replay does the same."""
        given = (self.weights, self.cache, self.shape.layers, lk.Head(self.norm, self.head), 1)
        return lk.draft(token, self.head, *given, extend=False, eps=EPS, noise=noise).tokens[:, 0]

    def round(self, token: Tensor, noise: lk.Noise | None = None) -> lk.Round:
        """A round of self-speculative decoding; the length stays, and acceptance is timed, not counted."""
        shape, cache = self.shape, self.cache._replace(seq_lens=self.lengths.clone())
        given = (self.weights, cache, shape.exit_layer, lk.Head(self.norm, self.head), shape.draft)
        return lk.speculative_round(token, self.head, *given, eps=EPS, noise=noise)

    def layer_bytes(self, start: int, end: int) -> int:
        """What layers [start, end) must read at least."""
        weights = self.weights[start * PER_LAYER : end * PER_LAYER]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def decoder_model(self) -> LayerSkipModel:
        """The same weights as a model that `layerskip.SelfSpeculativeDecoder` takes."""
        shape = self.shape
        layers = [LayerWeights(*self.weights[at : at + PER_LAYER]) for at in range(0, len(self.weights), PER_LAYER)]
        decoder = PartialDepthDecoder(layers, shape.groups, EPS, self.frequencies.float())
        config = SimpleNamespace(max_position_embeddings=CACHE_CAPACITY)
        return LayerSkipModel(self.head, decoder, EarlyExitHead(self.norm, self.head, EPS), config)


NO_GPU, RED_TESTS, DIFFERENT = 2, 1, 4
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


def gpu_facts() -> dict[str, Any]:
    """What a figure depends on."""
    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if find_spec("triton"):
        import triton

        versions["triton"] = triton.__version__
    return {
        "name": properties.name, "multiprocessors": properties.multi_processor_count, "driver": driver(), **versions
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
        print(f"No GPU: torch {torch.__version__} sees none, so there is nothing to measure.", file=sys.stderr)
        return NO_GPU
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
        "gpu": gpu_facts(), "tested": not args.skip_tests, "copy_bandwidth_gb_s": bandwidth / 1e9,
        "before": older, "results": [asdict(result) for result in results],
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, (json.dumps(report, indent=2) + "\n").encode())
    print(f"wrote {args.output}")
    different = [row["what"] for row in older["rows"] if not row["same"]]
    if different:
        print(f"the older version gives other results: {', '.join(different)}", file=sys.stderr)
    return DIFFERENT if different else 0


ACCEPTANCE, DRAFTED, DRAFT_ROWS = 0.8, 4, 32000
GOAL_US = 580  # a token of Llama-3.2-1B, E = 4


@dataclass(frozen=True)
class DraftHead:
    """A subset of a head's rows in int8, with a scale each."""

    weight: Tensor
    token_map: Tensor
    scale: Tensor

    @staticmethod
    def of(head: Tensor, rows: int) -> DraftHead:
        """The first ``rows``, rounded to 127 steps of their largest entry."""
        wide = head[:rows].float()
        scale = wide.abs().amax(1) / 127
        weight = (wide / scale[:, None]).round().to(torch.int8)
        return DraftHead(weight, torch.arange(len(weight), device=head.device), scale)


def tokens_a_round(acceptance: float, drafted: int) -> float:
    """Expected tokens where each draft holds with one probability: 1 + a + ... + a^K."""
    return sum(acceptance**i for i in range(drafted + 1))


def round_call(model: Model, drafted: int, noise: lk.Noise | None = None) -> Callable[[], lk.Round]:
    """A round of ``drafted`` drafts; the length stays, so that every replay does the same."""
    rounded = DraftHead.of(model.head, DRAFT_ROWS)
    draft_head = lk.Head(model.norm, rounded.weight, rounded.token_map, rounded.scale)
    token = torch.zeros(1, dtype=torch.int64, device=model.device)

    def call() -> lk.Round:
        cache = model.cache._replace(seq_lens=model.lengths.clone())
        return lk.speculative_round(
            token, model.head, model.weights, cache, model.shape.exit_layer, lk.Head(model.norm, model.head), drafted,
            draft_head=draft_head, eps=EPS, noise=noise,
        )  # fmt: skip

    return call


def round_cases(model: Model, time: Callable[[str, str, Callable[[], Any], str], Any]) -> Iterator[Any]:
    """Greedily and drawn, on every backend; ``time(what, backend, call, goal)`` measures."""
    expected = tokens_a_round(ACCEPTANCE, DRAFTED)
    goal = f"<= {GOAL_US * expected:.0f} us on an H100, {GOAL_US:.0f} a token" if model.shape.layers == 16 else ""
    for backend in ("cuda", "triton", "reference"):
        for how, noise in (("greedy", None), ("drawn", model.noise())):
            what = f"{model.shape.name} round, {DRAFT_ROWS} rows of int8 draft K={DRAFTED}, {how}"
            what += f", {expected:.2f} tokens at acceptance {ACCEPTANCE}"
            yield time(what, backend, round_call(model, DRAFTED, noise), goal)


ROOT = Path(__file__).parents[1]
BEFORE = "bbbc6ef209462a7f1ab647382a3236d91b842614"
"""Before x was prefetched, splits were joined in batches, choices in batches, blocks as many as a context needs."""
TURNS = 5
CLOSE = 0.02  # of its norm, by which what two versions give may differ: bf16 has steps of 2^-8. The tests say more


class OlderVersionError(RuntimeError):
    """There is no older version that could be measured beside this one."""


@contextmanager
def checkout(version: str) -> Iterator[Path]:
    """A folder with the built older version: the given one, or one that is made of a commit for as long as this lasts.

    Raises
    ------
    OlderVersionError
        If there is no such commit here, or it does not build.
    """
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="layerskip-before-") as name:
        folder = Path(name)
        archive = subprocess.run(["git", "archive", version], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            raise OlderVersionError(f"no commit {version} here: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**os.environ, "LAYERSKIP_CUDA": "1", "LAYERSKIP_CUDA_ARCHS": architecture()}
        built = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if built.returncode:
            raise OlderVersionError(f"commit {version} does not build: {built.stderr[-500:]}")
        yield folder


def architecture() -> str:
    """What nvcc calls the GPU: "80", "90a"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


class Worker:
    """A process that times the ops of the version in a folder."""

    def __init__(self, folder: Path, device: str, backend: str, arguments: Sequence[str] = ()) -> None:
        # Not as a file or a module: then Python would look in another folder first, here it is the version's.
        source = Path(__file__).with_name("gpu_worker.py").read_text(encoding="utf-8")
        command = [sys.executable, "-c", source, device, backend, *arguments]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            hello = self._read()
            if not Path(hello["package"]).is_relative_to(folder):  # another one is installed, or comes first
                raise OlderVersionError(f"in {folder} Python finds the package {hello['package']}")
        except BaseException:
            self.close()
            raise
        self.cases: list[str] = hello["cases"]

    def ask(self, case: str) -> dict[str, float]:
        """What the process says of a case."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        found: dict[str, float] = self._read()
        return found

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OlderVersionError(f"a worker ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def compare(
    before: Path, after: Path, device: str = "cuda", backend: str = "cuda", arguments: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """For each case the medians of both versions, in microseconds, their ratio, and whether both give the same."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(folder, device, backend, arguments))) for folder in (before, after)
        ]
        for case in workers[1].cases:
            turns = [[worker.ask(case) for worker in workers] for _ in range(TURNS)]
            old, new = (median(turn[index]["microseconds"] for turn in turns) for index in (0, 1))
            same = all(_alike(*turn) for turn in turns)
            yield {"what": case, "before_us": old, "after_us": new, "ratio": old / new, "same": same}


def _alike(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(abs(one[name] - other[name]) <= CLOSE * abs(other["norm"]) for name in ("norm", "along"))


def before_and_after(version: str) -> dict[str, Any]:
    """The part of a report: the lines of `compare`, and why there are no more, if there could be."""
    report: dict[str, Any] = {"version": version, "rows": []}
    try:
        with checkout(version) as folder:
            for row in compare(folder, ROOT):
                print(row, flush=True)
                report["rows"].append(row)
    except OlderVersionError as error:
        print(f"an older version is not measured: {error}", file=sys.stderr)
        report["skipped"] = str(error)
    return report


# memcheck: reads and writes out of bounds, misaligned ones, errors of the API; racecheck: hazards of shared memory.
TOOLS = ("memcheck", "racecheck")
NO_SANITIZER, FOUND = 3, 9
# Every tensor gets an allocation of its own, so that no other tensor lies past its end.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def sanitize() -> int:
    """Run each tool over the tests and print its findings; return the exit status."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(
            "compute-sanitizer is not on PATH: it comes with the CUDA toolkit, in its folder bin or compute-sanitizer "
            "(https://developer.nvidia.com/cuda-toolkit)",
            file=sys.stderr,
        )
        return NO_SANITIZER
    root = Path(__file__).parents[1]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(root / "tests" / "kernels" / "cuda_ops")]
    failed = []
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, *tests]
        status = subprocess.run(command, cwd=root, env={**os.environ, **ENVIRONMENT}).returncode
        if status != 0:
            failed.append(f"{tool} (exit {status})")
    print(f"compute-sanitizer: {', '.join(failed)} failed" if failed else f"compute-sanitizer: {TOOLS} found nothing")
    return FOUND if failed else 0


if __name__ == "__main__":
    sys.exit(main())
