"""Argument checks, one function per op, and the only place of their messages.

Each takes the bound arguments of its op (`schemas.bind`). The public op and its fake both call it, so a wrong call
raises the same error eagerly and under ``torch.compile``. Checks look at shapes, dtypes, devices and strides. Only
`positions`, `distinct_slots`, `temperatures` and `tokens`, which the reference and the Triton launchers call, look at
values, and only on the CPU: on a GPU that would be a host sync inside a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import PANEL_ROWS, format_of, is_interleaved, is_packed, kind_of
from .schemas import OPTIONAL_WEIGHTS, LayerWeights, derive, layer_shapes, weights_per_layer

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rms_norm(a: Any) -> None:
    require(a.x.dim() >= 1, "x must have at least one dimension")
    shaped("x", a.x, [None] * a.x.dim(), FLOATS)
    shaped("weight", a.weight, [a.x.shape[-1]], [a.x.dtype])
    _eps(a.eps)
    dense(weight=a.weight)
    same_device(a.x, weight=a.weight)


def linear(a: Any) -> None:
    shaped("x", a.x, [None, None], FLOATS)
    matrix("weight", a.weight, None, a.x.shape[1], a.x.dtype)
    if a.bias is not None:
        shaped("bias", a.bias, [a.weight.shape[0]], [a.x.dtype])
    if a.residual is not None:
        shaped("residual", a.residual, [a.x.shape[0], a.weight.shape[0]], [a.x.dtype])
    dense(weight=a.weight, bias=a.bias)
    same_device(a.x, weight=a.weight, bias=a.bias, residual=a.residual)


def swiglu(a: Any) -> None:
    shaped("x", a.x, [None, None], FLOATS)
    matrix("gate", a.gate, None, a.x.shape[1], a.x.dtype)
    matrix("up", a.up, a.gate.shape[0], a.x.shape[1], a.x.dtype)
    alike("gate", a.gate, "up", a.up, a.x.shape[1])
    dense(gate=a.gate, up=a.up)
    same_device(a.x, gate=a.gate, up=a.up)


def rope_kv_append(a: Any) -> None:
    shaped("q", a.q, [None] * 4, FLOATS)
    batch, rows, _, head_dim = a.q.shape
    _head_dim(head_dim)
    shaped("k", a.k, [batch, rows, None, head_dim], [a.q.dtype])
    shaped("v", a.v, list(a.k.shape), [a.q.dtype])
    _layer_cache(a)
    num_kv_heads = a.k.shape[2]
    require(a.k_cache.shape[1] == num_kv_heads, f"k has {num_kv_heads} key/value heads, the cache {a.k_cache.shape[1]}")
    _rope_tables(a.cos, a.sin, a.k_cache.shape[2], head_dim)
    same_device(a.q, k=a.k, v=a.v, cos=a.cos, sin=a.sin)


def verify_attention(a: Any) -> None:
    shaped("q", a.q, [None] * 4, FLOATS)
    num_heads, head_dim = a.q.shape[2:]
    _head_dim(head_dim)
    _layer_cache(a)
    num_kv_heads = a.k_cache.shape[1]
    require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads",
    )


def exit_head(a: Any) -> None:
    shaped("hidden", a.hidden, [None, None], FLOATS)
    rows, hidden_size = a.hidden.shape
    shaped("norm_weight", a.norm_weight, [hidden_size], [a.hidden.dtype])
    _eps(a.eps)
    dense(norm_weight=a.norm_weight)
    same_device(a.hidden, norm_weight=a.norm_weight)
    _head(a.hidden, head_weight=a.head_weight, token_map=a.token_map, scale=a.scale)
    if a.logits is not None:
        _written("logits", a.logits, [rows, a.head_weight.shape[0]])
        same_device(a.hidden, logits=a.logits)
    if a.temperature is not None or a.seed is not None or a.offset is not None:
        _sampling(a.hidden, rows, temperature=a.temperature, seed=a.seed, offset=a.offset)


def partial_forward(a: Any) -> None:
    _forward(a, num_draft_layers=0)


def _forward(a: Any, num_draft_layers: int) -> None:
    """Check layers [start, end) and, in the last layers of the cache, the draft layers."""
    shaped("hidden", a.hidden, [None] * 3, FLOATS)
    batch, rows = a.hidden.shape[:2]
    shaped("k_cache", a.k_cache, [None] * 5, [a.hidden.dtype])
    num_layers, _, num_kv_heads, capacity, head_dim = a.k_cache.shape
    within = 0 <= a.start <= a.end <= num_layers
    require(within, f"layers [{a.start}, {a.end}) are not within the cache's {num_layers} layers")
    _draft_layers(num_draft_layers, num_layers - a.end, num_layers)
    _head_dim(head_dim)
    _eps(a.eps)
    num_slots = batch if a.slots is None else None
    shaped("k_cache", a.k_cache, [num_layers, num_slots, None, None, head_dim], [a.hidden.dtype])
    shaped("v_cache", a.v_cache, list(a.k_cache.shape), [a.hidden.dtype])
    shaped("seq_lens", a.seq_lens, [batch], [torch.int64])
    _slots(a.slots, batch, a.k_cache.shape[1])
    require(rows <= capacity, f"{rows} rows do not fit a cache of capacity {capacity}")
    _rope_tables(a.cos, a.sin, capacity, head_dim)
    cache = {name: getattr(a, name) for name in ("k_cache", "v_cache", "seq_lens")}
    dense(**cache)
    same_device(a.hidden, **cache, cos=a.cos, sin=a.sin, slots=a.slots)
    _layers(a.hidden, a.weights, weights_per_layer(a.weights, a.start, a.end, num_draft_layers), num_kv_heads, head_dim)


def draft(a: Any) -> None:
    draft_of_any_layers(a)
    batch, rows, state = a.token.shape[0], a.num_speculations + a.extend, a.norm_weight
    states = state.expand(batch, rows, -1)
    _forward(derive("partial_forward", a, hidden=states, start=0, end=a.exit_layer), a.num_draft_layers)


def draft_of_any_layers(a: Any) -> None:
    """Check a draft, except for its layers."""
    _drafting(a)
    require(a.exit_layer >= 1, f"exit_layer must be at least 1, got {a.exit_layer}")
    batch, rows, state = a.token.shape[0], a.num_speculations + a.extend, a.norm_weight
    head = {"hidden": state.expand(batch * rows, -1), "temperature": None, "seed": None, "logits": None}
    exit_head(derive("exit_head", a, **head))
    if a.logits is not None:
        _written("logits", a.logits, [batch, a.num_speculations, a.head_weight.shape[0]])
        same_device(a.embedding, logits=a.logits)
    if a.temperature is not None or a.seed is not None:
        _sampling(a.embedding, batch, temperature=a.temperature, seed=a.seed)


def accept_greedy(a: Any) -> None:
    shaped("draft", a.draft, [None, None], [torch.int64])
    batch, num_speculations = a.draft.shape
    shaped("target", a.target, [batch, num_speculations + 1], [torch.int64])
    shaped("seq_lens", a.seq_lens, [batch], [torch.int64])
    dense(seq_lens=a.seq_lens)
    same_device(a.draft, target=a.target, seq_lens=a.seq_lens)


def accept_sampled(a: Any) -> None:
    shaped("draft", a.draft, [None, None], [torch.int64])
    batch, num_speculations = a.draft.shape
    shaped("draft_logits", a.draft_logits, [batch, num_speculations, None], [torch.float32])
    shaped("target_logits", a.target_logits, [batch, num_speculations + 1, None], [torch.float32])
    shaped("seq_lens", a.seq_lens, [batch], [torch.int64])
    draft_vocab_size, vocab_size = a.draft_logits.shape[2], a.target_logits.shape[2]
    require(vocab_size > 0, "target_logits has no tokens")
    require(draft_vocab_size > 0, "draft_logits has no tokens")
    if a.token_map is not None:
        shaped("token_map", a.token_map, [draft_vocab_size], [torch.int64])
    else:
        require(
            draft_vocab_size == vocab_size,
            f"draft_logits has {draft_vocab_size} tokens, target_logits {vocab_size}: without a token_map they must "
            "agree",
        )
    dense(seq_lens=a.seq_lens, token_map=a.token_map)
    others = {name: getattr(a, name) for name in ("draft_logits", "target_logits", "seq_lens", "token_map")}
    same_device(a.draft, **others)
    _sampling(a.draft, batch, temperature=a.temperature, seed=a.seed)


def speculative_round(a: Any) -> None:
    round_of_any_layers(a)
    batch, state, num_layers = a.token.shape[0], a.norm_weight, a.k_cache.shape[0] - a.num_draft_layers
    states = state.expand(batch, a.num_speculations + 1, -1)
    _forward(derive("partial_forward", a, hidden=states, start=0, end=num_layers), a.num_draft_layers)


def round_of_any_layers(a: Any) -> None:
    """Check a round, except for its layers."""
    _drafting(a)
    shaped("k_cache", a.k_cache, [None] * 5, [a.norm_weight.dtype])
    cache_layers, batch, state = a.k_cache.shape[0], a.token.shape[0], a.norm_weight
    _draft_layers(a.num_draft_layers, max(cache_layers - 1, 0), cache_layers)
    num_layers = cache_layers - a.num_draft_layers
    require(1 <= a.exit_layer <= num_layers, f"exit_layer must lie in [1, {num_layers}], got {a.exit_layer}")
    exit_head(derive("exit_head", a, hidden=state.expand(batch, -1), temperature=None, seed=None))
    if a.draft_norm_weight is not None:
        shaped("draft_norm_weight", a.draft_norm_weight, [state.shape[0]], [state.dtype])
        dense(draft_norm_weight=a.draft_norm_weight)
        same_device(state, draft_norm_weight=a.draft_norm_weight)
    draft_head = {name: getattr(a, name) for name in ("draft_head_weight", "draft_token_map", "draft_head_scale")}
    if a.draft_head_weight is None:
        given = [name for name, arg in draft_head.items() if arg is not None]
        require(not given, f"{', '.join(given)} needs a draft_head_weight")
    else:
        _head(state[None], **draft_head)
        rows, vocab_size = a.draft_head_weight.shape[0], a.head_weight.shape[0]
        require(
            a.temperature is None or a.draft_token_map is not None or rows == vocab_size,
            f"draft_head_weight has {rows} rows, head_weight {vocab_size}: to sample without a draft_token_map they "
            "must agree",
        )
    if a.temperature is not None or a.seed is not None:
        _sampling(a.embedding, batch, temperature=a.temperature, seed=a.seed)
        require(
            a.draft_threshold == 0,
            f"draft_threshold is {a.draft_threshold} with a temperature: dropping what was drawn because it is "
            "improbable would change the distribution",
        )


def early_exit_loss(a: Any) -> None:
    shaped("hiddens", a.hiddens, [None] * 3, (*FLOATS, torch.float64))  # float64 for gradcheck
    exits, rows, hidden_size = a.hiddens.shape
    require(exits > 0, "hiddens has no exit, its shape is " + str(list(a.hiddens.shape)))
    shaped("norm_weight", a.norm_weight, [hidden_size], [a.hiddens.dtype])
    shaped("head_weight", a.head_weight, [None, hidden_size], [a.hiddens.dtype])
    require(a.head_weight.shape[0] > 0, "head_weight has no rows")
    shaped("labels", a.labels, [rows], [torch.int64])
    shaped("exit_weights", a.exit_weights, [exits], [torch.float32, torch.float64])
    _eps(a.eps)
    require(a.ignore_index < 0, f"ignore_index must be negative, as no token is, got {a.ignore_index}")
    dense(norm_weight=a.norm_weight, head_weight=a.head_weight)
    others = {name: getattr(a, name) for name in ("norm_weight", "head_weight", "labels", "exit_weights")}
    same_device(a.hiddens, **others)


def early_exit_loss_backward(a: Any) -> None:
    early_exit_loss(derive("early_exit_loss", a))
    shaped("grad", a.grad, [], [torch.float32, torch.float64])
    shaped("logsumexp", a.logsumexp, list(a.hiddens.shape[:2]), [torch.float32, torch.float64])
    if a.slope.numel():
        shaped("slope", a.slope, list(a.hiddens.shape), [a.hiddens.dtype])


def layer_weights(
    weights: Sequence[Tensor], hidden_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Check the tensors of one layer as `partial_forward` takes them.

    Parameters
    ----------
    weights : sequence of Tensor
        Those of `LayerWeights`, with or without the optional ones; one without elements counts as not given.
    hidden_size, num_kv_heads, head_dim : int
        D, G and C.
    dtype : torch.dtype

    Raises
    ------
    ValueError, TypeError
        With the tensor's name, its shape, dtype or strides, and the expected ones.
    """
    weights_per_layer(weights, 0, 1)
    named = dict(zip(LayerWeights._fields, weights, strict=False))
    queries, keys, intermediate_size = named["q"].shape[0], num_kv_heads * head_dim, named["gate"].shape[0]
    require(queries % keys == 0, f"q has {queries} rows, not a multiple of {num_kv_heads} heads of size {head_dim}")
    shapes = layer_shapes(hidden_size, queries // head_dim, num_kv_heads, head_dim, intermediate_size)
    for name, tensor in named.items():
        if name in OPTIONAL_WEIGHTS and tensor.numel() == 0:
            continue
        sized(name, tensor, shapes[name], dtype)
    for first, name in (("q", "k"), ("q", "v"), ("gate", "up")):
        alike(first, named[first], name, named[name], hidden_size)
    dense(**named)


def positions(seq_lens: Tensor, rows: int, capacity: int) -> None:
    """Check that every row is inside the cache; on a GPU one outside gives NaN and writes nothing."""
    if seq_lens.device.type == "cpu" and seq_lens.numel() and rows:
        first, last = int(seq_lens.min()), int(seq_lens.max()) + rows - 1
        if first < 0 or last >= capacity:
            raise ValueError(f"position {last if last >= capacity else first} is outside the cache's {capacity}")


def distinct_slots(slots: Tensor | None, num_slots: int) -> None:
    """Check that every sequence has its own row of the cache; on a GPU a row outside gives NaN."""
    if slots is not None and slots.device.type == "cpu":
        listed = slots.tolist()
        if any(not 0 <= slot < num_slots for slot in listed) or len(set(listed)) < len(listed):
            raise ValueError(f"slots must be distinct and in [0, {num_slots}), got {listed}")


def tokens(token: Tensor, vocab_size: int) -> None:
    """Check that every token is in the vocabulary; not on a GPU, where it would be a host sync."""
    if token.device.type == "cpu":
        wrong = (token < 0) | (token >= vocab_size)
        if wrong.any():
            raise ValueError(f"token {int(token[wrong][0])} is outside the vocabulary of {vocab_size}")


def temperatures(temperature: Tensor | None) -> None:
    """Check that every temperature is finite and not negative; on a GPU a negative one counts as 0."""
    if temperature is not None and temperature.device.type == "cpu":
        for row, value in enumerate(temperature.tolist()):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"temperature[{row}] is {value}, expected a finite number of at least 0")


def _layers(hidden: Tensor, weights: Sequence[Tensor], per_layer: int, num_kv_heads: int, head_dim: int) -> None:
    """Check that the first layer fits the states and the cache, and that the other layers have its shapes."""
    if not weights:
        return
    first_layer = dict(zip(LayerWeights._fields, weights[:per_layer], strict=False))
    layer_weights(weights[:per_layer], hidden.shape[2], num_kv_heads, head_dim, hidden.dtype)
    queries, intermediate_size = first_layer["q"].shape[0], first_layer["gate"].shape[0]
    shapes = layer_shapes(hidden.shape[2], queries // head_dim, num_kv_heads, head_dim, intermediate_size)
    for index, tensor in enumerate(weights):
        name = LayerWeights._fields[index % per_layer]
        if name not in OPTIONAL_WEIGHTS or (tensor.numel() and first_layer[name].numel()):
            sized(name, tensor, shapes[name], hidden.dtype)
        dense(**{name: tensor})
        same_device(hidden, **{name: tensor})


def _layer_cache(a: Any) -> None:
    """Check the two caches of one layer, [B, G, T, C] or, with slots, [S, G, T, C], and the lengths."""
    batch, rows, _, head_dim = a.q.shape
    shaped("k_cache", a.k_cache, [batch if a.slots is None else None, None, None, head_dim], [a.q.dtype])
    shaped("v_cache", a.v_cache, list(a.k_cache.shape), [a.q.dtype])
    shaped("seq_lens", a.seq_lens, [batch], [torch.int64])
    _slots(a.slots, batch, a.k_cache.shape[0])
    dense(k_cache=a.k_cache, v_cache=a.v_cache, seq_lens=a.seq_lens)
    capacity = a.k_cache.shape[2]
    require(rows <= capacity, f"{rows} rows do not fit a cache of capacity {capacity}")
    same_device(a.q, k_cache=a.k_cache, v_cache=a.v_cache, seq_lens=a.seq_lens, slots=a.slots)


def _slots(slots: Tensor | None, batch: int, num_slots: int) -> None:
    if slots is not None:
        shaped("slots", slots, [batch], [torch.int64])
        dense(slots=slots)
        require(batch <= num_slots, f"slots has {batch} entries, the cache only {num_slots} rows")


def _rope_tables(cos: Tensor, sin: Tensor, capacity: int, head_dim: int) -> None:
    shaped("cos", cos, [None, head_dim // 2], [torch.float32])
    shaped("sin", sin, list(cos.shape), [torch.float32])
    require(cos.shape[0] >= capacity, f"cos has {cos.shape[0]} positions, the cache's capacity is {capacity}")
    dense(cos=cos, sin=sin)


def _head(hidden: Tensor, **named: Tensor | None) -> None:
    """Check a head's weight, token map and scale, which are given by name in this order."""
    (name, weight), (map_name, token_map), (scale_name, scale) = named.items()
    assert weight is not None
    if scale is None:
        matrix(name, weight, None, hidden.shape[1], hidden.dtype)
    else:
        shaped(name, weight, [None, hidden.shape[1]], [torch.int8])
    require(weight.shape[0] > 0, f"{name} has no rows")
    if token_map is not None:
        shaped(map_name, token_map, [weight.shape[0]], [torch.int64])
    if scale is not None:
        shaped(scale_name, scale, [weight.shape[0]], [torch.float32])
    dense(**named)
    same_device(hidden, **named)


def _drafting(a: Any) -> None:
    shaped("token", a.token, [None], [torch.int64])
    if is_packed(a.embedding):
        shaped("norm_weight", a.norm_weight, [None], FLOATS)
        matrix("embedding", a.embedding, None, a.norm_weight.shape[0], a.norm_weight.dtype)
    else:
        shaped("embedding", a.embedding, [None, None], FLOATS)
        shaped("norm_weight", a.norm_weight, [a.embedding.shape[1]], [a.embedding.dtype])
    require(a.embedding.shape[0] > 0, "embedding has no rows")
    require(a.num_speculations >= 0, f"num_speculations must not be negative, got {a.num_speculations}")
    require(a.num_speculations < 2**31 - 1, f"num_speculations must be below {2**31 - 1}, got {a.num_speculations}")
    require(0 <= a.draft_threshold <= 1, f"draft_threshold must lie in [0, 1], got {a.draft_threshold}")
    dense(embedding=a.embedding)
    same_device(a.embedding, token=a.token)


def _draft_layers(num_draft_layers: int, limit: int, cache_layers: int) -> None:
    require(
        0 <= num_draft_layers <= limit,
        f"num_draft_layers must lie in [0, {limit}], got {num_draft_layers}, with a cache of {cache_layers} layers",
    )


def _written(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Check an output buffer for logits: each row is contiguous, rows may be strided."""
    shaped(name, tensor, shape, [torch.float32])
    require(
        tensor.stride(-1) == 1 or tensor.shape[-1] <= 1,
        f"the rows of {name} must be contiguous, its strides are {tuple(tensor.stride())}",
    )


def _sampling(first: Tensor, rows: int, **given: Tensor | None) -> None:
    """Check temperature, seed and offset, one per row: all of them or none."""
    missing = [name for name, tensor in given.items() if tensor is None]
    require(not missing, f"{', '.join(given)} come together, {', '.join(missing)} is missing")
    for name, tensor in given.items():
        assert tensor is not None
        shaped(name, tensor, [rows], [torch.float32 if name == "temperature" else torch.int64])
    dense(**given)
    same_device(first, **given)


def _eps(eps: float) -> None:
    require(eps >= 0, f"eps must not be negative, got {eps}")


def _head_dim(size: int) -> None:
    require(size % 8 == 0 and 8 <= size <= 256, f"head_dim must be a multiple of 8 up to 256, got {size}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if len(shape) != len(wanted):
        return False
    for have, want in zip(shape, wanted, strict=True):  # noqa: SIM110  (runs per token; a generator costs twice this)
        if want is not None and want != have:
            return False
    return True


def shaped(name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Check rank, sizes (None is any) and dtype of a tensor."""
    if not fits(tensor.shape, shape):
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {wanted}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected {names}")


def matrix(name: str, weight: Tensor, rows: int | None, width: int, dtype: torch.dtype) -> None:
    """Check the weight of a matmul for states of ``width`` in ``dtype``, plain or packed."""
    if not is_packed(weight):
        shaped(name, weight, [rows, width], [dtype])
        return
    shaped(name, weight, [rows, None], [weight.dtype])
    if is_interleaved(weight):
        even = weight.shape[0] % PANEL_ROWS == 0
        require(even, f"{name} is interleaved and has {weight.shape[0]} rows, expected a multiple of {PANEL_ROWS}")
    try:
        format_of(weight, width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def alike(first_name: str, first: Tensor, name: str, weight: Tensor, width: int) -> None:
    """Check that two weights that multiply the same activations have formats of one kind."""
    require(
        first.dtype == weight.dtype and (not is_packed(first) or kind_of(first, width) == kind_of(weight, width)),
        f"{first_name} and {name} must be all plain, all of integers, or all of fp8, and all or none interleaved",
    )


def sized(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Check a layer's tensor, a vector or the weight of a matmul."""
    if len(shape) == 2:
        matrix(name, tensor, shape[0], shape[1], dtype)
    else:
        shaped(name, tensor, shape, [dtype])


def dense(**tensors: Tensor | None) -> None:
    """Check that weights and caches, which are used in place, are contiguous; activations may be strided."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, its strides are {tuple(tensor.stride())} for shape {list(tensor.shape)}"
            )


def same_device(first: Tensor, **others: Tensor | None) -> None:
    """Check that all tensors are on the device of the first argument."""
    device = first.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the first argument on {first.device}")
