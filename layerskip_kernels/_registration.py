"""Registers the ops with torch: schemas, fakes and autograd; nothing else.

Two namespaces share the schemas, see `schemas`: ``layerskip::<op>`` is what users call, its kernel is
`dispatch.serve`; ``layerskip_native::<op>`` is what the compiled libraries implement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from ._ops import add_op_namespace_prefix, ops
from .formats import dequantize
from .schemas import NATIVE, PUBLIC, SCHEMAS, native_ops

_public = torch.library.Library(PUBLIC, "DEF")
_native = torch.library.Library(NATIVE, "DEF")
_native.define("cpu_isa(str name) -> str")  # names the instruction set in use; sets it first unless name is empty
_native.define("dequantize(Tensor weight, Tensor(a!) out) -> ()")  # see `formats.plain`
# What `cpu_loss` does to a tile of logits in place; `begin` is the tile's first token.
_native.define(
    "loss_terms(Tensor(a!) logits, Tensor labels, int begin, float slack, Tensor(b!) shift, Tensor(c!) sum, "
    "Tensor(d!) label_logit, Tensor(e!)? slope) -> ()"
)
_native.define("loss_slopes(Tensor(a!) logits, Tensor labels, int begin, Tensor logsumexp, Tensor scale) -> ()")


def native(op: str) -> Callable[..., Any]:
    """The op of the compiled libraries, whether or not one of them implements it."""
    return getattr(native_ops, op).default


for _name, _schema in SCHEMAS.items():
    _public.define(_name + _schema)
    _native.define(_name + _schema)
    for _device in ("CPU", "CUDA"):
        _public.impl(_name, partial(dispatch.serve, _name), _device)


def _fake(op: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a function of the bound arguments as the fake of an op."""

    def register(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def fake(*args: Any) -> Any:
            return function(dispatch.checked(op, *args))

        torch.library.register_fake(add_op_namespace_prefix(op), fake, lib=_public)
        torch.library.register_fake(f"{NATIVE}::{op}", fake, lib=_native)
        return function

    return register


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@_fake("rms_norm")
def _(a: Any) -> Tensor:
    return _contiguous_like(a.x)


@_fake("linear")
def _(a: Any) -> Tensor:
    return a.x.new_empty(a.x.shape[0], a.weight.shape[0])


@_fake("swiglu")
def _(a: Any) -> Tensor:
    return a.x.new_empty(a.x.shape[0], a.gate.shape[0])


@_fake("rope_kv_append")
def _(a: Any) -> Tensor:
    return _contiguous_like(a.q)


@_fake("verify_attention")
def _(a: Any) -> Tensor:
    return _contiguous_like(a.q)


@_fake("exit_head")
def _(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = a.hidden.shape[0]
    logit = a.hidden.new_empty(rows, dtype=torch.float32)
    return a.hidden.new_empty(rows, dtype=torch.int64), logit, torch.empty_like(logit)


@_fake("partial_forward")
def _(a: Any) -> Tensor:
    return _contiguous_like(a.hidden)


@_fake("draft")
def _(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.token.shape[0]
    tokens = a.token.new_empty(batch, a.num_speculations)
    states = a.norm_weight.new_empty(batch, a.num_speculations + a.extend, a.norm_weight.shape[0])
    return tokens, states, torch.empty_like(tokens, dtype=torch.float32)


@_fake("accept_greedy")
def _(a: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a.seq_lens), torch.empty_like(a.seq_lens)


@_fake("accept_sampled")
def _(a: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a.seq_lens), torch.empty_like(a.seq_lens)


@_fake("speculative_round")
def _(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = a.token.new_empty(a.token.shape[0], a.num_speculations)
    probability = torch.empty_like(tokens, dtype=torch.float32)
    return tokens, torch.empty_like(a.seq_lens), torch.empty_like(a.seq_lens), probability


@_fake("early_exit_loss")
def _(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if a.hiddens.dtype == torch.float64 else torch.float32
    exits, rows = a.hiddens.shape[:2]
    slope = a.hiddens.new_empty(a.hiddens.shape if a.with_slope else 0)
    exit_losses = a.hiddens.new_empty(exits, dtype=wide)
    return a.hiddens.new_empty((), dtype=wide), exit_losses, a.hiddens.new_empty(exits, rows, dtype=wide), slope


@_fake("early_exit_loss_backward")
def _(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_head = torch.empty_like(a.head_weight) if a.head_grad else a.head_weight.new_empty(0)
    return _contiguous_like(a.hiddens), torch.empty_like(a.norm_weight), grad_head


def _autograd(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(add_op_namespace_prefix(op), backward, setup_context=setup, lib=_public)
    dispatch.differentiable(op)


def _save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*(arg for arg in inputs if isinstance(arg, Tensor)))
    ctx.scalars = tuple(arg for arg in inputs if isinstance(arg, float))


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return *reference.rms_norm_gradients(grad, x, weight, ctx.scalars[0]), None


def _linear_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.has_bias, ctx.has_residual = inputs[2] is not None, inputs[3] is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight = ctx.needs_input_grad[:2]
    weight = dequantize(weight, x.shape[1], x.dtype)
    return (
        grad @ weight if for_x else None,
        grad.T @ x if for_weight else None,
        grad.sum(0) if ctx.has_bias else None,
        grad if ctx.has_residual else None,
    )


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With a = x gate^T, b = x up^T, s = sigmoid(a): da = g b s (1 + a (1 - s)), db = g a s."""
    x, *weights = ctx.saved_tensors
    gate, up = (dequantize(weight, x.shape[1], x.dtype) for weight in weights)
    a, b = (x @ gate.T).float(), (x @ up.T).float()
    sigmoid = a.sigmoid()
    grad_a = (grad.float() * b * sigmoid * (1 + a * (1 - sigmoid))).to(x.dtype)
    grad_b = (grad.float() * a * sigmoid).to(x.dtype)
    for_x, for_gate, for_up = ctx.needs_input_grad
    return (
        grad_a @ gate + grad_b @ up if for_x else None,
        grad_a.T @ x if for_gate else None,
        grad_b.T @ x if for_up else None,
    )


def _loss_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    _, exit_losses, logsumexp, slope = output
    ctx.mark_non_differentiable(exit_losses, logsumexp, slope)
    ctx.save_for_backward(*inputs[:5], exit_losses, logsumexp, slope)
    ctx.eps, ctx.ignore_index = inputs[5:7]


def _loss_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    *inputs, exit_losses, logsumexp, slope = ctx.saved_tensors
    needs_hiddens, needs_norm, needs_head, _, needs_weights = ctx.needs_input_grad[:5]
    grads: list[Tensor | None] = [None, None, None]
    if needs_hiddens or needs_norm or needs_head:
        backward = ops.early_exit_loss_backward
        computed = backward(grad, *inputs, logsumexp, slope, ctx.eps, ctx.ignore_index, needs_head)
        wanted = (needs_hiddens, needs_norm, needs_head)
        grads = [one if needed else None for one, needed in zip(computed, wanted, strict=True)]
    return *grads, None, grad * exit_losses if needs_weights else None, None, None, None


_autograd("rms_norm", _rms_norm_backward, _save)
_autograd("linear", _linear_backward, _linear_setup)
_autograd("swiglu", _swiglu_backward, _save)
_autograd("early_exit_loss", _loss_backward, _loss_setup)
