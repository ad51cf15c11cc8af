"""Who computes a case: this library's backends in every format of weights, and beside them what others would take."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip.cli.options import version

from .cases import EPS, PLAIN, Case, packed, truth
from .harness import MOST_ERROR, Group, Variant, bytes_of, copies_of, reason
from .peers.processes import MissingPeerError

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
class Way:
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
    """The ways to compute a case, for each count of rows."""
    torch.compiler.reset()  # what was compiled for another case counts against how often torch compiles anew
    held = {form: copies_of(packed(case.weights, form)) for form in ([PLAIN, *formats] if case.packs else [PLAIN])}
    truths = {form: cache(partial(truth, case, copies[0])) for form, copies in held.items()}
    ours = {form: held[form] for form in (formats if case.packs else [PLAIN])}
    ways = [*_ours(case, ours, backends), *_beside(case, formats, held[PLAIN], device)]
    for count in case.counts:
        inputs = case.inputs(count)
        variants = [_variant(case, way, count, inputs, truths[way.weights if way.backend else PLAIN]) for way in ways]
        yield Group(case.op, model, case.shape, count, variants)
        ways = [way for way in ways if way.backend != "reference"]  # nobody decodes with it: once is enough


def _ours(case: Case, held: Mapping[str, list[tuple[Tensor, ...]]], backends: Sequence[str]) -> Iterator[Way]:
    own = f"layerskip-kernels {version('layerskip-kernels')}"
    wide = sum(one.numel() * 4 for one in case.weights)
    for backend in backends:
        function = case.around(case.ours)
        if backend == "reference" and wide > REFERENCE_BYTES:
            function = _refusing(f"it would hold {wide / 2**30:.1f} GiB of weights in fp32, several times")
        for form, copies in held.items():
            yield Way(backend, form, own, function, copies, backend)


def _beside(case: Case, formats: Sequence[str], plain: list[tuple[Tensor, ...]], device: torch.device) -> Iterator[Way]:
    for peer in PEERS:
        own = f"{peer.package} {version(peer.package)}"
        for form in peer.forms_of(case, formats):
            try:
                function, weights = peer.prepare(case, form, device)
            except Exception as error:
                function, weights = _refusing(reason(error)), case.weights
            copies = plain if weights is case.weights else copies_of(weights)
            yield Way(peer.name, form, own, function, copies, None, peer.forms[form])


def _refusing(why: str) -> Function:
    def refuse(*args: Any) -> None:
        raise MissingPeerError(why)

    return refuse


def _variant(
    case: Case, way: Way, count: int, inputs: tuple[Tensor, ...], true: Callable[[], Sequence[Tensor]]
) -> Variant:
    def run(copy: int) -> Any:
        return way.function(*inputs, *way.copies[copy])

    def first_rows() -> Sequence[Tensor]:
        fewer = count < max(case.counts)
        return [one.narrow(case.rows_at, 0, count) for one in true()] if fewer else true()

    return Variant(
        way.name, way.weights, run, len(way.copies), bytes_of(way.copies[0]), first_rows, way.version, way.backend,
        way.most_error,
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
    """Raise MissingPeerError where a package is not installed or, if a device is given, this is not a card."""
    if device is not None and device.type != "cuda":
        raise MissingPeerError("it needs a card")
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
