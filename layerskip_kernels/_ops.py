"""Schemas, fakes and autograd of the ops; nothing else.

Two namespaces share the schemas: ``layerskip::<op>`` is what users call, its kernel is `dispatch.call`;
``layerskip_native::<op>`` is what the compiled libraries implement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _checks, dispatch

SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor",
    "swiglu": "(Tensor x, Tensor gate, Tensor up) -> Tensor",
    "rope_kv_append": "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor seq_lens) -> Tensor",
    "verify_attention": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens) -> Tensor",
    "exit_head": "(Tensor hidden, Tensor norm_weight, Tensor head_weight, float eps, Tensor? token_map=None, "
    "Tensor? scale=None) -> (Tensor token, Tensor logit, Tensor logsumexp)",
    "partial_forward": "(Tensor hidden, Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos, "
    "Tensor sin, Tensor seq_lens, int start, int end, float eps) -> Tensor",
    "accept_greedy": "(Tensor draft, Tensor target, Tensor(a!) seq_lens) -> (Tensor accepted, Tensor next_token)",
}

_public = torch.library.Library("layerskip", "DEF")
_native = torch.library.Library("layerskip_native", "DEF")
_native.define("cpu_isa(str name) -> str")  # names the instruction set in use; sets it first unless name is empty


def native(op: str) -> Callable[..., Any]:
    """The op of the compiled libraries, whether or not one of them implements it."""
    return getattr(torch.ops.layerskip_native, op).default


def _kernel(op: str, *args: Any) -> Any:
    getattr(_checks, op)(*args)
    return dispatch.call(op, *args)


for _name, _schema in SCHEMAS.items():
    _public.define(_name + _schema)
    _native.define(_name + _schema)
    for _device in ("CPU", "CUDA"):
        _public.impl(_name, partial(_kernel, _name), _device)


def _fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            getattr(_checks, op)(*args)
            return function(*args)

        torch.library.register_fake(f"layerskip::{op}", checked, lib=_public)
        torch.library.register_fake(f"layerskip_native::{op}", checked, lib=_native)
        return function

    return register


@_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fake("linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("swiglu")
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0])


@_fake("rope_kv_append")
def _(q: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_fake("verify_attention")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_fake("exit_head")
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    logit = hidden.new_empty(rows, dtype=torch.float32)
    return hidden.new_empty(rows, dtype=torch.int64), logit, torch.empty_like(logit)


@_fake("partial_forward")
def _(hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@_fake("accept_greedy")
def _(draft: Tensor, target: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(seq_lens), torch.empty_like(seq_lens)


def _autograd(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"layerskip::{op}", backward, setup_context=setup, lib=_public)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*(arg for arg in inputs if isinstance(arg, Tensor)))
    ctx.scalars = tuple(arg for arg in inputs if isinstance(arg, float))


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """With r = 1/sqrt(mean x^2 + eps) and u = g w: dx = r u - r^3 x mean(u x), dw = sum g r x."""
    x, weight = (tensor.float() for tensor in ctx.saved_tensors)
    grad, dtype = grad.float(), ctx.saved_tensors[0].dtype
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.scalars[0])
    scaled = grad * weight
    grad_x = inverse * scaled - inverse**3 * x * (scaled * x).mean(-1, keepdim=True)
    grad_weight = (grad * inverse * x).flatten(0, -2).sum(0) if x.dim() > 1 else grad * inverse * x
    return grad_x.to(dtype), grad_weight.to(dtype), None


def _linear_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.has_bias, ctx.has_residual = inputs[2] is not None, inputs[3] is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    bias = grad.sum(0) if ctx.has_bias else None
    return grad @ weight, grad.T @ x, bias, grad if ctx.has_residual else None


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a = x gate^T, b = x up^T, s = sigmoid(a): da = g b s (1 + a (1 - s)), db = g a s."""
    x, gate, up = ctx.saved_tensors
    a, b = (x @ gate.T).float(), (x @ up.T).float()
    sigmoid = a.sigmoid()
    grad_a = (grad.float() * b * sigmoid * (1 + a * (1 - sigmoid))).to(x.dtype)
    grad_b = (grad.float() * a * sigmoid).to(x.dtype)
    return grad_a @ gate + grad_b @ up, grad_a.T @ x, grad_b.T @ x


_autograd("rms_norm", _rms_norm_backward, _save)
_autograd("linear", _linear_backward, _linear_setup)
_autograd("swiglu", _swiglu_backward, _save)
