"""What is measured: ops in the shapes of real models, in every format of weights, ours and torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels.formats import dequantize, quantize

from .harness import OURS, Group, Variant, copies_of

EPS = 1e-5
DTYPE = torch.bfloat16
PLAIN = "bf16"
SAMPLE = 512  # rows of a weight whose results are compared; the others are computed by the same loops
CONTEXT = 1024


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


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE) * shape[-1] ** -0.5


def _in_formats(weight: Tensor, formats: Sequence[str]) -> dict[str, list[Tensor]]:
    """A weight [N, D], plain and packed, each with its copies."""
    return {one: copies_of(lambda one=one: weight if one == PLAIN else quantize(weight, one)) for one in formats}


def _meant(weight: Tensor, width: int) -> Tensor:
    """What the first rows of a weight stand for, in float64."""
    first = weight[:SAMPLE]
    return (first if first.dtype == DTYPE else dequantize(first, width)).double()


def linear(model: str, shape: Shape, rows: Sequence[int], formats: Sequence[str]) -> Iterator[Group]:
    """The projection down from the feed-forward width, the largest matrix of a layer."""
    weights = _in_formats(_random(shape.D, shape.F), formats)
    for count in rows:
        x = torch.randn(count, shape.F, dtype=DTYPE)

        def variant(name: str, form: str, run: Callable[[Tensor, Tensor], Tensor], x: Tensor = x) -> Variant:
            own = weights[form]
            return Variant(
                name, form, lambda copy: run(x, own[copy]), len(own), own[0].nbytes,
                lambda: x.double() @ _meant(own[0], shape.F).T, lambda out: out[:, :SAMPLE],
            )  # fmt: skip

        found = [variant(OURS, form, lk.linear) for form in formats]
        yield Group("linear", model, f"{shape.D}×{shape.F}", count, [*found, variant("torch", PLAIN, F.linear)])


def swiglu(model: str, shape: Shape, rows: Sequence[int], formats: Sequence[str]) -> Iterator[Group]:
    """The projections up, with their activation."""
    gates, ups = (_in_formats(_random(shape.F, shape.D), formats) for _ in range(2))

    def eager(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    for count in rows:
        x = torch.randn(count, shape.D, dtype=DTYPE)

        def variant(name: str, form: str, run: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor = x) -> Variant:
            gate, up = gates[form], ups[form]
            return Variant(
                name, form, lambda copy: run(x, gate[copy], up[copy]), len(gate), 2 * gate[0].nbytes,
                lambda: eager(x.double(), _meant(gate[0], shape.D), _meant(up[0], shape.D)),
                lambda out: out[:, :SAMPLE],
            )  # fmt: skip

        found = [variant(OURS, form, lk.swiglu) for form in formats]
        yield Group("swiglu", model, f"2×{shape.F}×{shape.D}", count, [*found, variant("torch", PLAIN, eager)])


def exit_head(model: str, shape: Shape, rows: Sequence[int], formats: Sequence[str]) -> Iterator[Group]:
    """Norm, LM head and arg-max; the largest logit of each row is what is compared."""
    weights = _in_formats(_random(shape.V, shape.D), formats)
    norm = torch.ones(shape.D, dtype=DTYPE)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, (shape.D,), norm, EPS), weight).max(-1).values

    def ours(x: Tensor, weight: Tensor) -> Any:
        return lk.exit_head(x, norm, weight, EPS)

    def largest(x: Tensor, weight: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (shape.D,), norm.float(), EPS).to(DTYPE).float()
        parts = weight.split(8192)
        plain = (one.float() if one.dtype == DTYPE else dequantize(one, shape.D) for one in parts)
        return torch.stack([F.linear(normed, one).amax(-1) for one in plain]).amax(0)

    for count in rows:
        x = torch.randn(count, shape.D, dtype=DTYPE)

        def variant(
            name: str, form: str, run: Callable[[Tensor, Tensor], Any], values: Callable[[Any], Tensor], x: Tensor = x
        ) -> Variant:
            own = weights[form]
            return Variant(
                name, form, lambda copy: run(x, own[copy]), len(own), own[0].nbytes, lambda: largest(x, own[0]), values
            )

        found = [variant(OURS, form, ours, lambda out: out.logit) for form in formats]
        plain = variant("torch", PLAIN, eager, lambda out: out)
        yield Group("exit_head", model, f"{shape.V}×{shape.D}", count, [*found, plain])


def verify_attention(model: str, shape: Shape, rows: Sequence[int], formats: Sequence[str]) -> Iterator[Group]:
    """Some rows of one sequence over its cache; torch's attention gets the mask that they need."""
    keys, values = (copies_of(lambda: torch.randn(1, shape.G, CONTEXT, shape.C, dtype=DTYPE)) for _ in range(2))
    for count in rows:
        past = CONTEXT - count
        q, lengths = torch.randn(1, count, shape.H, shape.C, dtype=DTYPE), torch.tensor([past])
        mask = torch.arange(CONTEXT) <= past + torch.arange(count)[:, None]

        def attend(k: Tensor, v: Tensor, q: Tensor = q, mask: Tensor = mask) -> Tensor:
            return F.scaled_dot_product_attention(
                q.transpose(1, 2).to(k.dtype), k, v, attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)

        def ours(k: Tensor, v: Tensor, q: Tensor = q, lengths: Tensor = lengths) -> Tensor:
            return lk.verify_attention(q, k, v, lengths)

        def variant(name: str, run: Callable[[Tensor, Tensor], Tensor], attend: Any = attend) -> Variant:
            return Variant(
                name, PLAIN, lambda copy: run(keys[copy], values[copy]), len(keys), 2 * keys[0].nbytes,
                lambda: attend(keys[0].double(), values[0].double()),
            )  # fmt: skip

        heads = f"{shape.H}/{shape.G} heads of {shape.C}, {CONTEXT} positions"
        yield Group("verify_attention", model, heads, count, [variant(OURS, ours), variant("torch", attend)])


OPS = {"linear": linear, "swiglu": swiglu, "exit_head": exit_head, "verify_attention": verify_attention}
