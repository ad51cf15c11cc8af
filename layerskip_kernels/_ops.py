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

from . import _checks, dispatch, reference

SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor",
    "swiglu": "(Tensor x, Tensor gate, Tensor up) -> Tensor",
    "rope_kv_append": "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor seq_lens, Tensor? slots=None) -> Tensor",
    "verify_attention": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? slots=None) -> Tensor",
    "exit_head": "(Tensor hidden, Tensor norm_weight, Tensor head_weight, float eps, Tensor? token_map=None, "
    "Tensor? scale=None, Tensor? temperature=None, Tensor? seed=None, Tensor? offset=None, Tensor(a!)? logits=None) "
    "-> (Tensor token, Tensor logit, Tensor logsumexp)",
    "partial_forward": "(Tensor hidden, Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos, "
    "Tensor sin, Tensor seq_lens, int start, int end, float eps, Tensor? slots=None) -> Tensor",
    "draft": "(Tensor token, Tensor embedding, Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cos, Tensor sin, Tensor seq_lens, int end, Tensor norm_weight, Tensor head_weight, float eps, int steps, "
    "bool extend, Tensor? token_map=None, Tensor? scale=None, Tensor? slots=None, float min_probability=0.0, "
    "Tensor? temperature=None, Tensor? seed=None, Tensor(c!)? logits=None) "
    "-> (Tensor tokens, Tensor states, Tensor probability)",
    "accept_greedy": "(Tensor draft, Tensor target, Tensor(a!) seq_lens) -> (Tensor accepted, Tensor next_token)",
    "accept_sampled": "(Tensor draft, Tensor draft_logits, Tensor target_logits, Tensor(a!) seq_lens, "
    "Tensor temperature, Tensor seed, Tensor? token_map=None) -> (Tensor accepted, Tensor next_token)",
    "speculative_round": "(Tensor token, Tensor embedding, Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cos, Tensor sin, Tensor(c!) seq_lens, int exit_layer, Tensor norm_weight, Tensor head_weight, float eps, "
    "int steps, Tensor? draft_weight=None, Tensor? draft_map=None, Tensor? draft_scale=None, Tensor? slots=None, "
    "float min_probability=0.0, Tensor? temperature=None, Tensor? seed=None) "
    "-> (Tensor tokens, Tensor accepted, Tensor next_token, Tensor probability)",
    "early_exit_loss": "(Tensor hiddens, Tensor norm_weight, Tensor head_weight, Tensor labels, Tensor exit_weights, "
    "float eps=1e-5, int ignore_index=-100, bool with_slope=False) "
    "-> (Tensor loss, Tensor exit_losses, Tensor logsumexp, Tensor slope)",
    "early_exit_loss_backward": "(Tensor grad, Tensor hiddens, Tensor norm_weight, Tensor head_weight, Tensor labels, "
    "Tensor exit_weights, Tensor logsumexp, Tensor slope, float eps, int ignore_index, bool head_grad) "
    "-> (Tensor grad_hiddens, Tensor grad_norm, Tensor grad_head)",
}

_public = torch.library.Library("layerskip", "DEF")
_native = torch.library.Library("layerskip_native", "DEF")
_native.define("cpu_isa(str name) -> str")  # names the instruction set in use; sets it first unless name is empty
# What `cpu_loss` does to a tile of logits in place; `begin` is the tile's first token.
_native.define(
    "loss_terms(Tensor(a!) logits, Tensor labels, int begin, float slack, Tensor(b!) shift, Tensor(c!) sum, "
    "Tensor(d!) label_logit, Tensor(e!)? slope) -> ()"
)
_native.define("loss_slopes(Tensor(a!) logits, Tensor labels, int begin, Tensor logsumexp, Tensor scale) -> ()")


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
def _(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_fake("verify_attention")
def _(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_fake("exit_head")
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    logit = hidden.new_empty(rows, dtype=torch.float32)
    return hidden.new_empty(rows, dtype=torch.int64), logit, torch.empty_like(logit)


@_fake("partial_forward")
def _(hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@_fake("draft")
def _(token: Tensor, embedding: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    steps, extend = rest[10:12]
    tokens = token.new_empty(token.shape[0], steps)
    states = embedding.new_empty(token.shape[0], steps + extend, embedding.shape[1])
    return tokens, states, torch.empty_like(tokens, dtype=torch.float32)


@_fake("accept_greedy")
def _(draft: Tensor, target: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(seq_lens), torch.empty_like(seq_lens)


@_fake("accept_sampled")
def _(draft: Tensor, draft_logits: Tensor, target_logits: Tensor, seq_lens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(seq_lens), torch.empty_like(seq_lens)


@_fake("speculative_round")
def _(token: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    seq_lens, steps = rest[6], rest[11]
    tokens = token.new_empty(token.shape[0], steps)
    probability = torch.empty_like(tokens, dtype=torch.float32)
    return tokens, torch.empty_like(seq_lens), torch.empty_like(seq_lens), probability


@_fake("early_exit_loss")
def _(
    hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if hiddens.dtype == torch.float64 else torch.float32
    exits, rows = hiddens.shape[:2]
    with_slope = len(rest) > 3 and rest[3]
    slope = hiddens.new_empty(hiddens.shape if with_slope else 0)
    exit_losses = hiddens.new_empty(exits, dtype=wide)
    return hiddens.new_empty((), dtype=wide), exit_losses, hiddens.new_empty(exits, rows, dtype=wide), slope


@_fake("early_exit_loss_backward")
def _(grad: Tensor, hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grad_head = torch.empty_like(head_weight) if rest[-1] else head_weight.new_empty(0)
    grad_hiddens = torch.empty_like(hiddens, memory_format=torch.contiguous_format)
    return grad_hiddens, torch.empty_like(norm_weight), grad_head


def _autograd(op: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"layerskip::{op}", backward, setup_context=setup, lib=_public)


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
    return (
        grad @ weight if for_x else None,
        grad.T @ x if for_weight else None,
        grad.sum(0) if ctx.has_bias else None,
        grad if ctx.has_residual else None,
    )


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With a = x gate^T, b = x up^T, s = sigmoid(a): da = g b s (1 + a (1 - s)), db = g a s."""
    x, gate, up = ctx.saved_tensors
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
        backward = torch.ops.layerskip.early_exit_loss_backward
        computed = backward(grad, *inputs, logsumexp, slope, ctx.eps, ctx.ignore_index, needs_head)
        wanted = (needs_hiddens, needs_norm, needs_head)
        grads = [one if needed else None for one, needed in zip(computed, wanted, strict=True)]
    return *grads, None, grad * exit_losses if needs_weights else None, None, None, None


_autograd("rms_norm", _rms_norm_backward, _save)
_autograd("linear", _linear_backward, _linear_setup)
_autograd("swiglu", _swiglu_backward, _save)
_autograd("early_exit_loss", _loss_backward, _loss_setup)
