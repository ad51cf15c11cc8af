"""Registers the ops with torch: schemas, fakes and autograd, in both namespaces of `schemas`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from ._ops import ops
from .formats import dequantize
from .schemas import NATIVE, PUBLIC, SCHEMAS

_public = torch.library.Library(PUBLIC, "DEF")
_native = torch.library.Library(NATIVE, "DEF")
_native.define("cpu_isa(str name) -> str")  # sets the instruction set unless name is empty; returns the one in use
_native.define("dequantize(Tensor weight, Tensor(a!) out) -> ()")
_native.define("interleave(Tensor weight, int groups, int header, bool eight_bits, Tensor(a!) out) -> ()")
# The passes of `cpu_loss` over a tile of logits, in place; `begin` is the tile's first token.
_native.define(
    "loss_terms(Tensor(a!) logits, Tensor labels, int begin, float slack, Tensor(b!) shift, Tensor(c!) sum, "
    "Tensor(d!) label_logit, Tensor(e!)? slope) -> ()"
)
_native.define("loss_slopes(Tensor(a!) logits, Tensor labels, int begin, Tensor logsumexp, Tensor scale) -> ()")


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _exit_head_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    token = a.hidden.new_empty(a.hidden.shape[0], dtype=torch.int64)
    return token, torch.empty_like(token, dtype=torch.float32), torch.empty_like(token, dtype=torch.float32)


def _draft_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.token.shape[0]
    tokens = a.token.new_empty(batch, a.num_speculations)
    states = a.norm_weight.new_empty(batch, a.num_speculations + a.extend, a.norm_weight.shape[0])
    return tokens, states, torch.empty_like(tokens, dtype=torch.float32)


def _accept_fake(a: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a.seq_lens), torch.empty_like(a.seq_lens)


def _round_fake(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = a.token.new_empty(a.token.shape[0], a.num_speculations)
    return tokens, *_accept_fake(a), torch.empty_like(tokens, dtype=torch.float32)


def _loss_fake(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if a.hiddens.dtype == torch.float64 else torch.float32
    exits, rows = a.hiddens.shape[:2]
    loss, exit_losses, logsumexp = (a.hiddens.new_empty(shape, dtype=wide) for shape in ((), (exits,), (exits, rows)))
    return loss, exit_losses, logsumexp, a.hiddens.new_empty(a.hiddens.shape if a.with_slope else 0)


def _loss_backward_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_head = torch.empty_like(a.head_weight) if a.head_grad else a.head_weight.new_empty(0)
    return _like(a.hiddens), torch.empty_like(a.norm_weight), grad_head


FAKES: dict[str, Callable[[Any], Any]] = {  # functions of the bound arguments
    "rms_norm": lambda a: _like(a.x),
    "linear": lambda a: a.x.new_empty(a.x.shape[0], a.weight.shape[0]),
    "swiglu": lambda a: a.x.new_empty(a.x.shape[0], a.gate.shape[0]),
    "rope_kv_append": lambda a: _like(a.q),
    "verify_attention": lambda a: _like(a.q),
    "exit_head": _exit_head_fake,
    "partial_forward": lambda a: _like(a.hidden),
    "draft": _draft_fake,
    "accept_greedy": _accept_fake,
    "accept_sampled": _accept_fake,
    "speculative_round": _round_fake,
    "early_exit_loss": _loss_fake,
    "early_exit_loss_backward": _loss_backward_fake,
}


def _checked_fake(op: str, *args: Any) -> Any:
    return FAKES[op](dispatch.checked(op, *args))


for _name, _schema in SCHEMAS.items():
    _public.define(_name + _schema)
    _native.define(_name + _schema)
    for _device in ("CPU", "CUDA"):
        _public.impl(_name, partial(dispatch.serve, _name), _device)
    torch.library.register_fake(f"{PUBLIC}::{_name}", partial(_checked_fake, _name), lib=_public)
    torch.library.register_fake(f"{NATIVE}::{_name}", partial(_checked_fake, _name), lib=_native)


def _autograd(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"{PUBLIC}::{op}", backward, setup_context=setup, lib=_public)
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


class _OnceDifferentiable(torch.autograd.Function):
    """Return the first ``count`` tensors, gradients of an op that depend on all; a second derivative raises."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{ctx.op} is differentiable once: it has no second derivatives")


def _loss_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():
        return _loss_gradients(ctx, grad)
    with torch.no_grad():  # with create_graph=True: these gradients must not enter the graph as constants
        grads = _loss_gradients(ctx, grad)
    computed = [one for one in grads if one is not None]
    inputs = (tensor for tensor in ctx.saved_tensors[:5] if tensor.is_floating_point())
    marked = iter(_OnceDifferentiable.apply("early_exit_loss", len(computed), *computed, grad, *inputs))
    return tuple(None if one is None else next(marked) for one in grads)


def _loss_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
