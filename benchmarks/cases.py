"""Benchmark cases: ops in the shapes of real models, each as this library's call and as equivalent torch code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.formats import can_interleave, dequantize, interleave, quantize
from layerskip_kernels.schemas import REQUIRED_WEIGHTS, layer_shapes

EPS = 1e-5
DTYPE = torch.bfloat16
PLAIN = "bf16"
UNIQUE = 8192  # rows of a matrix that differ; further ones repeat them, so that large ones are soon made and packed
AT_ONCE = 8192  # rows that are widened at a time
CONTEXT = 1024
DRAFTED = 6
EXITS, TRAINED_ROWS = 2, 64

Matmul = Callable[[Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """A model's sizes, by the letters of docs/kernels.md."""

    D: int
    F: int
    H: int
    G: int
    C: int
    V: int


MODELS = {
    "SmolLM2-135M": Shape(576, 1536, 9, 3, 64, 49152),
    "Qwen3-0.6B": Shape(1024, 3072, 16, 8, 128, 151936),
    "Llama-3.2-1B": Shape(2048, 8192, 32, 8, 64, 128256),
    "Llama-3-8B": Shape(4096, 14336, 32, 8, 128, 128256),
}


@dataclass(frozen=True)
class Case:
    """An op in one model's shape, for some counts of rows.

    ``ours`` takes what ``inputs(count)`` gives, then the ``weights``, and returns a tensor or several. So does
    ``torch``, whose first argument is the function that multiplies states by a matrix: `F.linear`, or `exact`. The
    dimension ``rows_at`` of a result has the rows; those of fewer rows are the first ones of more. ``around`` is put
    around functions like ``ours``, whoever's they are.
    """

    op: str
    shape: str
    counts: Sequence[int]
    inputs: Callable[[int], tuple[Tensor, ...]]
    weights: tuple[Tensor, ...]
    ours: Callable[..., Any]
    torch: Callable[..., Any]
    packs: bool = False  # whether the matrices among the weights may be packed
    rows_at: int = 0
    around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function


class Make:
    """Random tensors on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def states(self, *shape: int) -> Tensor:
        """Normal ones."""
        return torch.randn(shape, dtype=DTYPE, device=self.device)

    def norm(self, width: int) -> Tensor:
        """The weight of a norm."""
        return 1 + 0.1 * self.states(width)

    def matrix(self, rows: int, width: int) -> Tensor:
        """Whose products with states are about as large as these."""
        return _repeated(self.states(min(rows, UNIQUE), width) * width**-0.5, rows)

    def tokens(self, vocabulary: int, *shape: int) -> Tensor:
        """Of 0 … vocabulary - 1."""
        return torch.randint(vocabulary, shape, device=self.device)

    def range(self, start: int, end: int) -> Tensor:
        """start … end - 1."""
        return torch.arange(start, end, device=self.device)


def _repeated(part: Tensor, rows: int) -> Tensor:
    return part.repeat(-(-rows // len(part)), 1)[:rows]


def packed(weights: Sequence[Tensor], form: str) -> tuple[Tensor, ...]:
    """Weights of a case whose matrices are in a format, interleaved where decoding has them so."""
    if form == PLAIN:
        return tuple(weights)
    return tuple(_kept(_repeated(quantize(one[:UNIQUE], form), len(one)), one) if one.dim() == 2 else one
                 for one in weights)  # fmt: skip


def _kept(weight: Tensor, plain: Tensor) -> Tensor:
    width = plain.shape[1]
    inside = weight.is_cpu and lk.multiplies_panels() and can_interleave(weight, width)
    return interleave(weight, width) if inside else weight


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ in fp32, of a plain or a packed weight, some rows of it at a time."""
    return torch.cat([F.linear(x, dequantize(rows, x.shape[-1])) for rows in weight.split(AT_ONCE)], -1)


def truth(case: Case, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a case should give for the most rows, in fp32."""

    def wide(one: Tensor) -> Tensor:
        return one.float() if one.is_floating_point() else one

    def run(*args: Tensor) -> Any:
        return case.torch(exact, *args)

    with torch.inference_mode(False), torch.no_grad():  # a loss needs gradients of its inputs
        inputs = map(wide, case.inputs(max(case.counts)))
        found = case.around(run)(*inputs, *(one if one.dim() == 2 else wide(one) for one in weights))
    return (found,) if isinstance(found, Tensor) else tuple(found)


def rms_norm(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """The norm of one state a row."""
    x = make.states(max(counts), shape.D)

    def eager(matmul: Matmul, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return lk.rms_norm(x, weight, EPS)

    return Case("rms_norm", f"{shape.D}", counts, lambda count: (x[:count],), (make.norm(shape.D),), ours, eager)


def linear(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """The projection down from the feed-forward width, the largest matrix of a layer."""
    x = make.states(max(counts), shape.F)

    def eager(matmul: Matmul, x: Tensor, weight: Tensor) -> Tensor:
        return matmul(x, weight)

    return Case(
        "linear", f"{shape.D}×{shape.F}", counts, lambda count: (x[:count],), (make.matrix(shape.D, shape.F),),
        lk.linear, eager, packs=True,
    )  # fmt: skip


def _gated(matmul: Matmul, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(matmul(x, gate)) * matmul(x, up)


def swiglu(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """The projections up, with their activation."""
    x = make.states(max(counts), shape.D)
    weights = (make.matrix(shape.F, shape.D), make.matrix(shape.F, shape.D))
    return Case(
        "swiglu", f"2×{shape.F}×{shape.D}", counts, lambda count: (x[:count],), weights, lk.swiglu, _gated, packs=True
    )


def exit_head(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """Norm, LM head and arg-max; compares the largest logit of each row."""
    x = make.states(max(counts), shape.D)

    def eager(matmul: Matmul, x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        return matmul(F.rms_norm(x, norm.shape, norm, EPS), head).max(-1).values

    def ours(x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        return lk.exit_head(x, norm, head, EPS).logit

    weights = (make.norm(shape.D), make.matrix(shape.V, shape.D))
    return Case(
        "exit_head", f"{shape.V}×{shape.D}", counts, lambda count: (x[:count],), weights, ours, eager, packs=True
    )


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)  # fmt: skip


def verify_attention(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """Some rows of one sequence over its cache; torch's attention gets the mask that they need."""
    past = CONTEXT - max(counts)
    q, lengths = make.states(1, max(counts), shape.H, shape.C), make.range(past, past + 1)
    mask = make.range(0, CONTEXT) <= make.range(past, CONTEXT)[:, None]

    def eager(matmul: Matmul, q: Tensor, mask: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return _attention(q, keys, values, mask)

    def ours(q: Tensor, mask: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return lk.verify_attention(q, keys, values, lengths)

    caches = tuple(make.states(1, shape.G, CONTEXT, shape.C) for _ in range(2))
    heads = f"{shape.H}/{shape.G} heads of {shape.C}, {CONTEXT} positions"
    return Case(
        "verify_attention", heads, counts, lambda count: (q[:, :count], mask[:count]), caches, ours, eager, rows_at=1
    )


def partial_forward(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """One layer, of which a draft takes several, over the cache of one sequence."""
    past = CONTEXT - max(counts)
    positions, lengths = make.range(past, CONTEXT), make.range(past, past + 1)
    hidden, mask = make.states(1, max(counts), shape.D), make.range(0, CONTEXT) <= positions[:, None]
    angle = torch.outer(make.range(0, CONTEXT), 10000.0 ** (-make.range(0, shape.C // 2) * 2 / shape.C))
    cos, sin = angle.cos(), angle.sin()

    def rotated(states: Tensor, positions: Tensor) -> Tensor:  # [1, M, H, C]
        first, second = states.chunk(2, -1)
        c, s = cos[positions, None], sin[positions, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1).to(states.dtype)

    def eager(matmul: Matmul, hidden: Tensor, positions: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        attn_norm, q, k, v, o, mlp_norm, gate, up, down, keys, values = weights
        normed = F.rms_norm(hidden, attn_norm.shape, attn_norm, EPS)
        query, key, value = (matmul(normed, one).unflatten(-1, (-1, shape.C)) for one in (q, k, v))
        keys[0].index_copy_(2, positions, rotated(key, positions).transpose(1, 2))
        values[0].index_copy_(2, positions, value.transpose(1, 2))
        attended = _attention(rotated(query, positions), keys[0], values[0], mask)
        hidden = hidden + matmul(attended.flatten(2), o)
        normed = F.rms_norm(hidden, mlp_norm.shape, mlp_norm, EPS)
        return hidden + matmul(_gated(matmul, normed, gate, up), down)

    def ours(hidden: Tensor, positions: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        *layer, keys, values = weights
        return lk.partial_forward(hidden, layer, lk.KVCache(keys, values, cos, sin, lengths), 0, 1, EPS)

    sizes = layer_shapes(shape.D, shape.H, shape.G, shape.C, shape.F)
    layer = [make.norm(*sizes[name]) if "norm" in name else make.matrix(*sizes[name]) for name in REQUIRED_WEIGHTS]
    caches = [make.states(1, 1, shape.G, CONTEXT, shape.C) for _ in range(2)]
    return Case(
        "partial_forward", f"a layer, {CONTEXT} positions", counts,
        lambda count: (hidden[:, :count], positions[:count], mask[:count]), (*layer, *caches), ours, eager,
        packs=True, rows_at=1,
    )  # fmt: skip


def accept_greedy(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """Of each of some sequences, how many drafts hold."""
    batch = max(counts)
    draft = make.tokens(shape.V, batch, DRAFTED)
    target = torch.cat([draft, draft[:, :1]], 1)
    target[make.range(0, batch), make.range(0, batch) % DRAFTED + 1] += 1  # up to here drafts are accepted

    def eager(matmul: Matmul, draft: Tensor, target: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        accepted = (draft == target[:, :-1]).cumprod(1).sum(1)
        lengths += accepted + 1
        return accepted, target.gather(1, accepted[:, None])[:, 0]

    return Case(
        "accept_greedy", f"{DRAFTED} drafts", counts,
        lambda count: (draft[:count], target[:count], make.tokens(1, count)), (), lk.accept_greedy, eager,
    )  # fmt: skip


def _with_gradients(loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function like ``loss`` that gives the gradients, too; of the head's as many rows as are compared."""

    def run(hiddens: Tensor, labels: Tensor, norm: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [one.detach().requires_grad_() for one in (hiddens, norm, head)]
            found = loss(leaves[0], labels, *leaves[1:])
            of_hiddens, of_norm, of_head = torch.autograd.grad(found, leaves)
        return found.detach(), of_hiddens, of_norm, of_head[:UNIQUE]

    return run


def early_exit_loss(shape: Shape, counts: Sequence[int], make: Make) -> Case:
    """The mean loss of some exits over one head, forward and backward; its count of rows is its own."""
    hiddens = make.states(EXITS, TRAINED_ROWS, shape.D)
    labels = make.tokens(shape.V, TRAINED_ROWS)
    shares = torch.full((EXITS,), 1 / EXITS, device=make.device)

    def eager(matmul: Matmul, hiddens: Tensor, labels: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        normed = F.rms_norm(hiddens, norm.shape, norm, EPS)
        return torch.stack([F.cross_entropy(matmul(one, head).float(), labels) for one in normed]).mean()

    def ours(hiddens: Tensor, labels: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        return lk.early_exit_loss(hiddens, norm, head, labels, shares, EPS).loss

    weights = (make.norm(shape.D), make.matrix(shape.V, shape.D))
    return Case(
        "early_exit_loss", f"{EXITS} exits, {shape.V}×{shape.D}", [TRAINED_ROWS], lambda count: (hiddens, labels),
        weights, ours, eager, around=_with_gradients,
    )  # fmt: skip


OPS = {
    one.__name__: one
    for one in (
        rms_norm, linear, swiglu, verify_attention, partial_forward, exit_head, accept_greedy, early_exit_loss
    )
}  # fmt: skip
