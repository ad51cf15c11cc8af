"""The ops' signatures: namespaces, schemas, arguments by name, and named tuples of arguments and results.

``layerskip::<op>`` is what users call; ``layerskip_native::<op>`` is what the compiled libraries implement. The
schemas are the only Python list of an op's flat arguments. Letters as in `functional`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix

PUBLIC = add_op_namespace_prefix("").removesuffix("::")
NATIVE = f"{PUBLIC}_native"
native_ops: Any = getattr(torch.ops, NATIVE)

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
    """The arguments of an op as a named tuple in the schema's order, with the schema's defaults."""
    return _ARGUMENTS[op](*args, **named)


def flatten(op: str, *bundles: NamedTuple | None, **named: Any) -> Any:
    """`bind` the fields of ``bundles``, which have the names of arguments, and the arguments that are ``named``."""
    for bundle in bundles:
        if bundle is not None:
            named.update(zip(bundle._fields, bundle))  # noqa: B905  (of one length; strict costs as much as the rest)
    return _ARGUMENTS[op](**named)


def derive(op: str, given: Any, **named: Any) -> Any:
    """`bind` what is ``named``, and the rest from ``given``, the bound arguments of another op, by name."""
    known = {name: getattr(given, name) for name in _common(op, type(given)._fields)}
    return _ARGUMENTS[op](**{**known, **named})


@cache
def _common(op: str, others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in _ARGUMENTS[op]._fields if name in others)


def has_native(op: str, device: str) -> bool:
    """Return whether a compiled library implements an op on a device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE}::{op}", device.upper()))


class LayerWeights(NamedTuple):
    """The tensors of one layer in the order of the ops' ``weights``; the last five are optional.

    ``attn_norm``, ``mlp_norm`` [D], ``q`` [H C, D], ``k``, ``v`` [G C, D], ``o`` [D, H C], ``gate``, ``up`` [F, D],
    ``down`` [D, F], ``q_bias`` [H C], ``k_bias``, ``v_bias`` [G C], ``q_norm``, ``k_norm`` [C].
    """

    attn_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


OPTIONAL_WEIGHTS = tuple(LayerWeights._field_defaults)
REQUIRED_WEIGHTS = tuple(name for name in LayerWeights._fields if name not in OPTIONAL_WEIGHTS)


def layer_shapes(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a layer by name, in the order of `LayerWeights`."""
    queries, keys = num_heads * head_dim, num_kv_heads * head_dim
    return {
        "attn_norm": (hidden_size,),
        "q": (queries, hidden_size),
        "k": (keys, hidden_size),
        "v": (keys, hidden_size),
        "o": (hidden_size, queries),
        "mlp_norm": (hidden_size,),
        "gate": (intermediate_size, hidden_size),
        "up": (intermediate_size, hidden_size),
        "down": (hidden_size, intermediate_size),
        "q_bias": (queries,),
        "k_bias": (keys,),
        "v_bias": (keys,),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }


def weights_per_layer(weights: Sequence[Tensor], start: int, end: int, num_draft_layers: int = 0) -> int:
    """The number of tensors per layer in ``weights``, the flat list of layers [start, end) and the draft layers.

    Raises
    ------
    ValueError
        If the list has neither the required nor all tensors of each layer.
    """
    num_layers = end - start + num_draft_layers
    required, all_weights = len(REQUIRED_WEIGHTS), len(LayerWeights._fields)
    if num_layers == 0 and not weights:
        return required
    for per_layer in (required, all_weights):
        if len(weights) == num_layers * per_layer:
            return per_layer
    draft_layers = f" and {num_draft_layers} draft layers" if num_draft_layers else ""
    raise ValueError(
        f"layers [{start}, {end}){draft_layers} take {required} or {all_weights} weights each, got {len(weights)} for "
        f"{num_layers} layers"
    )


def split_layers(weights: Sequence[Tensor], start: int, end: int) -> Iterator[LayerWeights]:
    """The weights of each of the layers [start, end); an optional tensor without elements is None."""
    per_layer, required = weights_per_layer(weights, start, end), len(REQUIRED_WEIGHTS)
    for first in range(0, len(weights), per_layer):
        optional = (weight if weight.numel() else None for weight in weights[first + required : first + per_layer])
        yield LayerWeights(*weights[first : first + required], *optional)


class KVCache(NamedTuple):
    """Keys and values, written in place, and the lengths of the sequences.

    ``k_cache``, ``v_cache`` [L, B, G, T, C]; ``cos``, ``sin`` [≥ T, C/2] fp32, of the rotary embedding; ``seq_lens``
    [B] int64. With ``slots`` [B] int64, no duplicates, sequence b uses row ``slots[b]`` of the cache, which may then
    have any number of rows instead of B.
    """

    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor
    sin: Tensor
    seq_lens: Tensor
    slots: Tensor | None = None


class Head(NamedTuple):
    """A final norm and a head: ``norm_weight`` [D], ``head_weight`` [V, D].

    A draft head may have rows for some tokens only, with their ``token_map`` [V] int64, and may be int8 with a
    ``scale`` [V] fp32 per row.
    """

    norm_weight: Tensor
    head_weight: Tensor
    token_map: Tensor | None = None
    scale: Tensor | None = None


class Noise(NamedTuple):
    """How to sample: ``temperature`` [B] fp32, 0 is greedy, and ``seed`` [B] int64."""

    temperature: Tensor
    seed: Tensor


class ExitOutput(NamedTuple):
    """The output of an exit head: ``token`` [R] int64, its ``logit`` [R] fp32, ``logsumexp`` [R] fp32.

    ``exp(logit - logsumexp)`` is the token's probability. A token of -1 marks a row whose logits are not finite.
    """

    token: Tensor
    logit: Tensor
    logsumexp: Tensor


class Draft(NamedTuple):
    """Draft tokens.

    ``tokens`` [B, K] int64, ``states`` [B, K or K + 1, D] after layer E, ``probability`` [B, K] fp32 of each token
    according to the exit.
    """

    tokens: Tensor
    states: Tensor
    probability: Tensor


class Acceptance(NamedTuple):
    """The number of leading draft tokens ``accepted`` [B] int64, and the ``next_token`` [B] int64."""

    accepted: Tensor
    next_token: Tensor


class Round(NamedTuple):
    """The result of a round of self-speculative decoding.

    Of the draft ``tokens`` [B, K] int64 the leading ``accepted`` [B] int64 are accepted, ``next_token`` [B] int64
    follows them; ``probability`` [B, K] fp32 of each draft token according to the exit.
    """

    tokens: Tensor
    accepted: Tensor
    next_token: Tensor
    probability: Tensor


class EarlyExitLossOutput(NamedTuple):
    """The scalar ``loss``, and ``exit_losses`` [N], the mean loss of each exit, whose backward raises."""

    loss: Tensor
    exit_losses: Tensor
