"""Measure ops: check each against a higher precision, then time all in turns, cold and warm, and the memory's speed."""

from __future__ import annotations

import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerskip_kernels as lk
from layerskip import devices
from layerskip.cli.options import instructions, processor, version
from layerskip.devices import ReadBandwidth

from .cases import EPS, PLAIN, Case, packed, truth

CPU = torch.device("cpu")
ROTATED_BYTES = 256 * 2**20  # of one variant's weights: more than a last-level cache, so that they come from memory
MOST_COPIES = 128  # of small ones, which the memory's measurement drives out of the caches before each turn
MOST_ERROR = 0.02  # of the largest value; a result in bf16 is rounded by 0.004 of itself, an intermediate one, too
MOST_SECONDS, LEAST_CALLS = 0.5, 3  # stop calling a variant after both
AHEAD_CYCLES = 2_000_000  # of a GPU: about a millisecond, in which the host gets ahead of it


class MissingPeerError(Exception):
    """A peer cannot be measured; the message says why."""


class WrongResultError(Exception):
    """A variant is wrong, so it is not timed."""


@dataclass
class Variant:
    """A method for one number of rows, by a backend of this library (``backend``) or by a peer (None).

    ``run(i)`` takes the i-th copy of its weights, of which there are ``copies``, and returns a tensor or some, of which
    ``truth`` are the right values. ``bytes_read`` must come from memory at least.
    """

    name: str
    weights: str
    run: Callable[[int], Any]
    copies: int
    bytes_read: int
    truth: Callable[[], Any]
    version: str = ""
    backend: str | None = None
    most_error: float = MOST_ERROR
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)

    def check(self) -> float:
        """The largest error of a result over its largest true value.

        Raises
        ------
        WrongResultError
            If it is too large, or not a number.
        BackendError, MissingPeerError
            If the backend does not serve the call, or the peer fails.
        """
        try:
            with lk.use_backend(self.backend):
                found = self.run(0)
        except Exception as error:
            if self.backend is not None:
                raise
            raise MissingPeerError(reason(error)) from error
        error = max_error(_several(found), _several(self.truth()))
        if not error <= self.most_error:
            raise WrongResultError(f"{self.name} in {self.weights}: an error of {error:.3g} of the largest value")
        return error

    def take(self, copy: int, device: torch.device) -> None:
        """Time a cold call and, of weights that a cache could hold, a warm one, unless it has taken long enough."""
        if len(self.cold) >= LEAST_CALLS and sum(self.cold) + sum(self.warm) > MOST_SECONDS:
            return
        calls = 1 if self.bytes_read > ROTATED_BYTES else 2
        with lk.use_backend(self.backend):
            times = seconds(lambda: self.run(copy), calls, device)
        for kept, one in zip((self.cold, self.warm), times, strict=False):
            kept.append(one)


@dataclass
class Group:
    """Ways to compute the same for some rows of a model's shape."""

    op: str
    model: str
    shape: str
    rows: int
    variants: list[Variant]


def max_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of each tensor over its largest true value, of these the largest, or NaN.

    Raises
    ------
    WrongResultError
        If a shape is another.
    """
    errors = []
    for one, true in zip(found, truth, strict=True):
        if one.shape != true.shape:
            raise WrongResultError(f"a result of shape {tuple(one.shape)}, expected {tuple(true.shape)}")
        errors.append((one.double() - true.double()).abs().max() / true.double().abs().max())
    return float(torch.stack(errors).amax())  # which is NaN if one is


def _several(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def reason(error: Exception) -> str:
    """Why a peer is skipped. It is others' code, which may raise anything and then stops nobody else's measurement."""
    if isinstance(error, MissingPeerError):
        return str(error)
    return f"it raised {type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def bytes_of(weights: Sequence[Tensor]) -> int:
    """What tensors hold; those of torchao are made of several."""
    total = 0
    for one in weights:
        parts = one.__tensor_flatten__()[0] if hasattr(one, "__tensor_flatten__") else None
        total += one.nbytes if parts is None else bytes_of([getattr(one, name) for name in parts])
    return total


def copies_of(weights: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Weights, and as many copies as one has to rotate through for none to be in a cache."""
    more = min(ROTATED_BYTES // max(bytes_of(weights), 1), MOST_COPIES)
    return [tuple(weights), *(tuple(one.clone() for one in weights) for _ in range(more))]


def seconds(call: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    """Seconds of each of several successive calls: on a GPU the time of the kernels, not of the launch."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(calls):
            call()
            moments.append(time.perf_counter())
        return [end - start for start, end in pairwise(moments)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda._sleep(AHEAD_CYCLES)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def measure(group: Group, repeats: int, memory: ReadBandwidth, device: torch.device = CPU) -> Iterator[dict[str, Any]]:
    """A row for each variant: figures, what is wrong with it, or why it was skipped.

    Those that are right take turns, forwards and backwards. A cold call takes weights that were not touched for a
    while, a warm one those of the call before it.
    """
    checked = [_checked(variant) for variant in group.variants]
    right = [variant for variant, found in zip(group.variants, checked, strict=True) if "error" in found]
    speeds, calls = [], 0
    for number in range(repeats):
        speeds.append(memory.sample())
        for variant in right if number % 2 else right[::-1]:
            calls += 1
            variant.take(calls % variant.copies, device)
    for variant, found in zip(group.variants, checked, strict=True):
        row = {
            "op": group.op, "model": group.model, "shape": group.shape, "rows": group.rows, "variant": variant.name,
            "weights": variant.weights, "version": variant.version, **found, "machine": machine(device),
        }  # fmt: skip
        if variant.cold:
            row |= {
                "bytes": variant.bytes_read, "memory GB/s": statistics.median(speeds),
                "GB/s": variant.bytes_read / statistics.median(variant.cold) / 1e9,
                "cold": _spread(variant.cold), "seconds": variant.cold,
            }  # fmt: skip
        if variant.warm:
            row["warm"] = _spread(variant.warm)
        yield row


def _checked(variant: Variant) -> dict[str, Any]:
    """Its error, what is wrong, or why it is skipped, as a part of its row."""
    try:
        return {"error": variant.check()}
    except WrongResultError as error:
        return {"wrong": str(error)}
    except (lk.BackendError, MissingPeerError) as error:
        return {"skipped": str(error)}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p10": deciles[0], "median": statistics.median(seconds), "p90": deciles[-1]}


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "cpu": processor(),
        "device": devices.described(device),
        "threads": torch.get_num_threads(),
        "isa": instructions(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


REFERENCE_BYTES = 2**29  # of weights in fp32, which the reference holds a few times over
TORCHAO_GROUP = 32  # weights that share a scale in four bits, as in the format int4 of ours
Function = Callable[..., Any]
Prepared = tuple[Function, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Peer:
    """Others' code for the cases whose ``ops`` it names, or for all.

    ``prepare(case, form, device)`` returns a function like `Case.ours` with the weights that it takes, or raises
    `MissingPeerError` with the reason why there is none. ``forms`` maps each format of weights to the error that its
    results may have; a format of the peer's own is held to the plain weights.
    """

    name: str
    package: str
    prepare: Callable[[Case, str, torch.device], Prepared]
    forms: Mapping[str, float]
    ops: Sequence[str] | None = None

    def forms_of(self, case: Case, formats: Sequence[str]) -> list[str]:
        """The formats in which it computes a case, of those that are asked for."""
        if self.ops is not None and case.op not in self.ops:
            return []
        return [form for form in self.forms if form == PLAIN or (case.packs and form in formats)]


@dataclass(frozen=True)
class Method:
    """A function like `Case.ours`, with copies of the weights that it takes."""

    name: str
    weights: str
    version: str
    function: Function
    copies: list[tuple[Tensor, ...]]
    backend: str | None = None
    most_error: float = MOST_ERROR


def groups(
    case: Case, model: str, formats: Sequence[str], backends: Sequence[str], device: torch.device
) -> Iterator[Group]:
    """The methods to compute a case, for each count of rows."""
    torch.compiler.reset()  # graphs of other cases count towards torch's recompile limit
    held = {form: copies_of(packed(case.weights, form)) for form in ([PLAIN, *formats] if case.packs else [PLAIN])}
    truths = {form: cache(partial(truth, case, copies[0])) for form, copies in held.items()}
    ours = {form: held[form] for form in (formats if case.packs else [PLAIN])}
    methods = [*_ours(case, ours, backends), *_beside(case, formats, held[PLAIN], device)]
    for count in case.counts:
        inputs = case.inputs(count)
        variants = [
            _variant(case, method, count, inputs, truths[method.weights if method.backend else PLAIN])
            for method in methods
        ]
        yield Group(case.op, model, case.shape, count, variants)
        methods = [one for one in methods if one.backend != "reference"]  # nobody decodes with it: once is enough


def _ours(case: Case, held: Mapping[str, list[tuple[Tensor, ...]]], backends: Sequence[str]) -> Iterator[Method]:
    own = f"layerskip-kernels {version('layerskip-kernels')}"
    wide = sum(one.numel() * 4 for one in case.weights)
    for backend in backends:
        function = case.around(case.ours)
        if backend == "reference" and wide > REFERENCE_BYTES:
            function = _refusing(f"it would hold {wide / 2**30:.1f} GiB of weights in fp32, several times")
        for form, copies in held.items():
            yield Method(backend, form, own, function, copies, backend)


def _beside(
    case: Case, formats: Sequence[str], plain: list[tuple[Tensor, ...]], device: torch.device
) -> Iterator[Method]:
    for peer in PEERS:
        own = f"{peer.package} {version(peer.package)}"
        for form in peer.forms_of(case, formats):
            try:
                function, weights = peer.prepare(case, form, device)
            except Exception as error:
                function, weights = _refusing(reason(error)), case.weights
            copies = plain if weights is case.weights else copies_of(weights)
            yield Method(peer.name, form, own, function, copies, None, peer.forms[form])


def _refusing(why: str) -> Function:
    def refuse(*args: Any) -> None:
        raise MissingPeerError(why)

    return refuse


def _variant(
    case: Case, method: Method, count: int, inputs: tuple[Tensor, ...], true: Callable[[], Sequence[Tensor]]
) -> Variant:
    def run(copy: int) -> Any:
        return method.function(*inputs, *method.copies[copy])

    def first_rows() -> Sequence[Tensor]:
        fewer = count < max(case.counts)
        return [one.narrow(case.rows_at, 0, count) for one in true()] if fewer else true()

    return Variant(
        method.name, method.weights, run, len(method.copies), bytes_of(method.copies[0]), first_rows, method.version,
        method.backend, method.most_error,
    )  # fmt: skip


def _torch(case: Case) -> Function:
    def run(*args: Tensor) -> Any:
        return case.torch(F.linear, *args)

    return run


def eager(case: Case, form: str, device: torch.device) -> Prepared:
    """What torch does as it reads the code."""
    return case.around(_torch(case)), case.weights


def compiled(case: Case, form: str, device: torch.device) -> Prepared:
    """The same code, compiled."""
    return case.around(torch.compile(_torch(case))), case.weights


def torchao(case: Case, form: str, device: torch.device) -> Prepared:
    """The same code with weight-only formats of torchao, compiled, as torchao advises."""
    _need("torchao", "torchao")
    torch._logging.set_logs(inductor=logging.ERROR)  # else each of its tensors says at length that it is not cached
    warnings.filterwarnings("ignore", ".*_stable_hash_for_caching")
    weights = tuple(_by_torchao(one, form, device) if one.dim() == 2 else one for one in case.weights)
    return torch.compile(_torch(case)), weights


def _by_torchao(weight: Tensor, form: str, device: torch.device) -> Tensor:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # Its settings for the compiler are torch's for all that is compiled, so they stay as they are.
    config: Any
    if form == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    elif device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=TORCHAO_GROUP, set_inductor_config=False)
    else:
        config = Int4WeightOnlyConfig(
            group_size=TORCHAO_GROUP, set_inductor_config=False, int4_packing_format="tile_packed_to_4d"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, config)
    return layer.weight.detach()


def liger(case: Case, form: str, device: torch.device) -> Prepared:
    """Liger's fused linear and cross-entropy, exit by exit."""
    _need("liger_kernel", "liger-kernel", device)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    entropy = LigerFusedLinearCrossEntropyLoss()
    return _exit_by_exit(case, lambda states, head, labels: entropy(head, states, labels))


def cut_cross_entropy(case: Case, form: str, device: torch.device) -> Prepared:
    """Cut cross-entropy (Wijmans et al. 2024), exit by exit."""
    _need("cut_cross_entropy", "cut-cross-entropy", device)
    from cut_cross_entropy import linear_cross_entropy

    return _exit_by_exit(case, linear_cross_entropy)


def _exit_by_exit(case: Case, entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    def loss(hiddens: Tensor, labels: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        normed = F.rms_norm(hiddens, norm.shape, norm, EPS)
        return torch.stack([entropy(one, head, labels) for one in normed]).mean()

    return case.around(loss), case.weights


def _need(module: str, package: str, device: torch.device | None = None) -> None:
    """Raise MissingPeerError where a package is not installed or, if a device is given, this is not a GPU."""
    if device is not None and device.type != "cuda":
        raise MissingPeerError("it needs a GPU")
    if find_spec(module) is None:
        raise MissingPeerError(f"it is not installed: pip install {package}")


# What a format of the peer's own loses, of the largest value: eight bits of a row's largest weight, four of a group's.
_LOST = {"int8": 0.03, "int4": 0.2}
PEERS = (
    Peer("torch", "torch", eager, {PLAIN: MOST_ERROR}),
    Peer("torch.compile", "torch", compiled, {PLAIN: MOST_ERROR}),
    Peer("torchao", "torchao", torchao, _LOST),
    Peer("liger", "liger-kernel", liger, {PLAIN: MOST_ERROR}, ["early_exit_loss"]),
    Peer("cut-cross-entropy", "cut-cross-entropy", cut_cross_entropy, {PLAIN: MOST_ERROR}, ["early_exit_loss"]),
)
