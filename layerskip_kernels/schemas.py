"""The ops' schemas, and their arguments by name; the only place that lists the arguments of `draft` and the like."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any, NamedTuple

import torch

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
    "Tensor cos, Tensor sin, Tensor seq_lens, int exit_layer, Tensor norm_weight, Tensor head_weight, float eps, "
    "int num_speculations, bool extend, Tensor? token_map=None, Tensor? scale=None, Tensor? slots=None, "
    "float draft_threshold=0.0, Tensor? temperature=None, Tensor? seed=None, Tensor(c!)? logits=None, "
    "int num_draft_layers=0) -> (Tensor tokens, Tensor states, Tensor probability)",
    "accept_greedy": "(Tensor draft, Tensor target, Tensor(a!) seq_lens) -> (Tensor accepted, Tensor next_token)",
    "accept_sampled": "(Tensor draft, Tensor draft_logits, Tensor target_logits, Tensor(a!) seq_lens, "
    "Tensor temperature, Tensor seed, Tensor? token_map=None) -> (Tensor accepted, Tensor next_token)",
    "speculative_round": "(Tensor token, Tensor embedding, Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cos, Tensor sin, Tensor(c!) seq_lens, int exit_layer, Tensor norm_weight, Tensor head_weight, float eps, "
    "int num_speculations, Tensor? draft_head_weight=None, Tensor? draft_token_map=None, "
    "Tensor? draft_head_scale=None, Tensor? slots=None, float draft_threshold=0.0, Tensor? temperature=None, "
    "Tensor? seed=None, Tensor? draft_norm_weight=None, int num_draft_layers=0) "
    "-> (Tensor tokens, Tensor accepted, Tensor next_token, Tensor probability)",
    "early_exit_loss": "(Tensor hiddens, Tensor norm_weight, Tensor head_weight, Tensor labels, Tensor exit_weights, "
    "float eps=1e-5, int ignore_index=-100, bool with_slope=False) "
    "-> (Tensor loss, Tensor exit_losses, Tensor logsumexp, Tensor slope)",
    "early_exit_loss_backward": "(Tensor grad, Tensor hiddens, Tensor norm_weight, Tensor head_weight, Tensor labels, "
    "Tensor exit_weights, Tensor logsumexp, Tensor slope, float eps, int ignore_index, bool head_grad) "
    "-> (Tensor grad_hiddens, Tensor grad_norm, Tensor grad_head)",
}


def _arguments_type(op: str) -> Any:
    arguments = torch._C.parse_schema(op + SCHEMAS[op]).arguments
    defaults = [argument.default_value for argument in arguments if argument.has_default_value()]
    return namedtuple(op, [argument.name for argument in arguments], defaults=defaults)


_ARGUMENTS = {op: _arguments_type(op) for op in SCHEMAS}


def bind(op: str, *args: Any, **named: Any) -> Any:
    """The arguments of an op by their names, with the schema's defaults: a named tuple, in the schema's order."""
    return _ARGUMENTS[op](*args, **named)


def flatten(op: str, *bundles: NamedTuple | None, **named: Any) -> Any:
    """As `bind`, out of bundles whose fields are arguments of the op, and of what is named besides."""
    for bundle in bundles:
        if bundle is not None:
            named.update(zip(bundle._fields, bundle))  # noqa: B905  (of one length; strict costs as much as the rest)
    return _ARGUMENTS[op](**named)


def derive(op: str, given: Any, **named: Any) -> Any:
    """As `bind`, with what is ``named``, and else what the bound arguments ``given`` of another op call the same."""
    known = {name: getattr(given, name) for name in _common(op, type(given)._fields)}
    return _ARGUMENTS[op](**{**known, **named})


@cache
def _common(op: str, others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in _ARGUMENTS[op]._fields if name in others)
