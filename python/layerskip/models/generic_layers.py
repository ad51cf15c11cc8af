"""Decoder layers made of small ops, for architectures that `layerskip_kernels.partial_forward` does not compute.

A row's result does not depend on the rows beside it: the ops guarantee that, sums of two tensors round once per
element, and torch's vectorized functions run on each row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import (
    KVCache,
    LayerWeights,
    linear,
    partial_forward,
    rms_norm,
    rope_kv_append,
    swiglu,
    verify_attention,
)
from layerskip_kernels.dispatch import call
from layerskip_kernels.schemas import bind
from layerskip_kernels.speculative import Ops

from .hf_checks import UnsupportedModelError
from .kv_cache import SharedKVCache
from .layers import HeldWeights, PartialDepthDecoder, Product, Watch, attend_prompt, parts_of, torch_linear
from .rotary import Rotary, pair_order


@dataclass(frozen=True)
class LayerConfig:
    """How the layers and the head of a model compute, beside their weights.

    Attributes
    ----------
    eps : float
        Of every norm.
    rotaries : tuple of Rotary
    rotary_index : tuple of int
        The rotary embedding of each layer; by default the first.
    max_positions : int or None
        How many positions are computed as the model does; None for any number.
    embedding_scale : float
        Factor of the first layer's input.
    round_embedding_scale : bool
        Whether that factor is first rounded to the dtype of the states.
    fused : bool
        Whether `layerskip_kernels.partial_forward` computes the layers. If not, they are made of small ops, and:
    norm_offset : float
        Is added to the weights of norms.
    gelu : bool
        Selects the tanh form of GELU, not SiLU.
    rotary_dim : int or None
        How many values of a head are rotated; None for all.
    windows : tuple of int or None
        How many positions each layer sees, its own included; None for all.
    experts_per_token : int
        0 without experts.
    normalize_experts : bool
        Whether the weights of a row's experts are scaled to a sum of 1.
    """

    eps: float
    rotaries: tuple[Rotary, ...]
    rotary_index: tuple[int, ...] = ()
    max_positions: int | None = None
    embedding_scale: float = 1.0
    round_embedding_scale: bool = False
    fused: bool = True
    norm_offset: float = 0.0
    gelu: bool = False
    rotary_dim: int | None = None
    windows: tuple[int | None, ...] = ()
    experts_per_token: int = 0
    normalize_experts: bool = False

    @property
    def one_call(self) -> bool:
        """Whether one op computes any number of layers, and with embedding and head a whole round."""
        return self.fused and len(self.rotaries) == 1 and self.embedding_scale == 1.0


WINDOW_ROWS = 8  # rows whose windows are copied at a time


class GenericWeights(NamedTuple):
    """The tensors of a layer, with norms before or after attention and feed-forward.

    Shapes as in `layerskip_kernels.LayerWeights`, except that ``q_norm`` and ``k_norm`` may be as wide as all heads.
    Instead of ``gate``, ``up`` and ``down`` there may be N experts: ``router`` [N, D], ``experts_in`` [N, 2 F, D],
    the rows of gate before those of up, and ``experts_out`` [N, D, F].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    attn_norm: Tensor | None = None
    attn_post_norm: Tensor | None = None
    mlp_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    router: Tensor | None = None
    experts_in: Tensor | None = None
    experts_out: Tensor | None = None


class Kernels(NamedTuple):
    """Products and attention for a few rows, or for the many of a prompt.

    ``residual`` takes x, a weight and the residual; ``gated`` takes x, gate, up and whether the activation is GELU;
    ``attend`` takes q [B, M, H, C], the cache of one layer and the window, and returns [B, M, H, C].
    """

    product: Product
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    attend: Callable[[Tensor, KVCache, int | None], Tensor]


def compute_layer(
    hidden: Tensor,
    weights: GenericWeights,
    cache: KVCache,
    config: LayerConfig,
    window: int | None,
    order: Tensor | None,
    kernels: Kernels,
    watch: Watch | None = None,
) -> Tensor:
    """The states [B, M, D] after a layer; keys and values are written into ``cache``, which is of this layer alone.

    ``order`` permutes the values of a head, see `pair_order`.
    """
    seen, w, eps = watch or (lambda name, states: None), cast("Any", weights), config.eps
    batch, rows, width = hidden.shape
    flat = hidden.reshape(-1, width)

    def add(flat: Tensor, x: Tensor, weight: Tensor, norm: Tensor | None) -> Tensor:
        """flat + norm(x weightᵀ), with one rounding if there is no norm in between."""
        if norm is None:
            return kernels.residual(x, weight, flat)
        return flat + _norm(kernels.product(x, weight, None), norm, eps)

    normed = _norm(flat, w.attn_norm, eps)
    seen("attention", normed)
    heads = (batch, rows, -1, cache.k_cache.shape[3])
    q = _norm_heads(kernels.product(normed, w.q, w.q_bias), w.q_norm, eps).view(heads)
    k = _norm_heads(kernels.product(normed, w.k, w.k_bias), w.k_norm, eps).view(heads)
    v = kernels.product(normed, w.v, w.v_bias).view(heads)
    if order is not None:
        q, k = q[..., order], k[..., order]
    q = rope_kv_append(q, k, v, cache.cos, cache.sin, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)
    attended = kernels.attend(q, cache, window).reshape(batch * rows, -1)
    seen("attended", attended)
    flat = add(flat, attended, w.o, w.attn_post_norm)

    normed = _norm(flat, w.mlp_norm, eps)
    seen("feed-forward", normed)
    if w.router is not None:
        out = flat + _norm(_experts(normed, w, config, kernels), w.mlp_post_norm, eps)
    else:
        inner = kernels.gated(normed, w.gate, w.up, config.gelu)
        seen("gated", inner)
        out = add(flat, inner, w.down, w.mlp_post_norm)
    return out.view(hidden.shape)


def _experts(x: Tensor, w: Any, config: LayerConfig, kernels: Kernels) -> Tensor:
    """Each row's sum over its experts, from the first to the last, so that it does not depend on the other rows."""
    chances, chosen = kernels.product(x, w.router, None).float().softmax(-1).topk(config.experts_per_token)
    if config.normalize_experts:
        chances = chances / reduce(torch.add, chances.unbind(1))[:, None]  # a sum in this order, whatever the rows
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = w.experts_in[expert].chunk(2)
        done = kernels.product(kernels.gated(x[rows], gate, up, config.gelu), w.experts_out[expert], None)
        out[rows] += (done * chances[rows, places, None]).to(x.dtype)
    return out


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm, rounded once at the end if the weight is in fp32 and x is not."""
    if weight is None:
        return x
    return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)


def _norm_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Norm of each head, or of all together, as wide as the weight."""
    return x if weight is None else _norm(x.view(x.shape[0], -1, weight.numel()), weight, eps)


def _gelu(x: Tensor) -> Tensor:
    """The tanh form. On a CPU torch computes the tail of a tensor differently, so each row is computed alone."""
    if not x.is_cpu or not len(x):
        return F.gelu(x, approximate="tanh")
    return torch.stack([F.gelu(row, approximate="tanh") for row in x])


def attend(q: Tensor, cache: KVCache, window: int | None) -> Tensor:
    """Each row sees the positions up to its own, or the last ``window`` of them.

    A window is copied for each row, from its first position on, so that the sum does not depend on other rows.
    """
    keys, values, lengths = cache.k_cache, cache.v_cache, cache.seq_lens
    if window is None or not _is_reached(window, q, cache):
        return verify_attention(q, keys, values, lengths, cache.slots)
    batch, rows, heads, size = q.shape
    positions = (lengths[:, None] + torch.arange(rows, device=q.device)).flatten()
    slots = torch.arange(batch, device=q.device) if cache.slots is None else cache.slots
    slots, queries = slots.repeat_interleave(rows), q.reshape(-1, 1, heads, size)
    first = (positions - window + 1).clamp_min(0)
    offsets = torch.arange(min(window, keys.shape[2]), device=q.device)
    parts = []
    for begin in range(0, batch * rows, WINDOW_ROWS):
        some = slice(begin, begin + WINDOW_ROWS)
        places = (first[some, None] + offsets).clamp_max(keys.shape[2] - 1)
        # Positions [R, W] of rows [R, 1]: [R, G, W, C]
        own_keys, own_values = (
            half.transpose(1, 2)[slots[some, None], places].transpose(1, 2).contiguous() for half in (keys, values)
        )
        parts.append(verify_attention(queries[some], own_keys, own_values, positions[some] - first[some]))
    return torch.cat(parts).view(q.shape)


def _is_reached(window: int, q: Tensor, cache: KVCache) -> bool:
    """Whether a row may be past the window. On a GPU, reading the lengths would synchronize."""
    if cache.k_cache.shape[2] <= window or not q.numel():
        return False
    return not q.is_cpu or int(cache.seq_lens.max()) + q.shape[1] > window


def _attend_prompt(q: Tensor, cache: KVCache, window: int | None) -> Tensor:
    if window is not None:
        return attend(q, cache, window)
    return attend_prompt(q, cache.k_cache, cache.v_cache, cache.seq_lens, int(cache.seq_lens[0])).view(q.shape)


def _gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return _gelu(linear(x, gate)) * linear(x, up) if gelu else swiglu(x, gate, up)


def _torch_gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    gates = torch_linear(x, gate)
    return (F.gelu(gates, approximate="tanh") if gelu else F.silu(gates)) * torch_linear(x, up)


FEW_ROWS = Kernels(linear, lambda x, weight, residual: linear(x, weight, residual=residual), _gated, attend)
MANY_ROWS = Kernels(
    torch_linear, lambda x, weight, residual: residual + torch_linear(x, weight), _torch_gated, _attend_prompt
)


class GenericDecoder(PartialDepthDecoder):
    """Layers that one op does not compute: an op for each run of layers with one rotary embedding, or small ops.

    Rounds are made of such calls, too (`ops`). Everything else is as in `PartialDepthDecoder`: one cache, rollback by a
    length, and the same bits for a row whatever is computed with it.

    Parameters
    ----------
    layers : sequence of mapping or LayerWeights
        As in `PartialDepthDecoder`; the tensors of `GenericWeights` if the layers are not fused.
    num_kv_heads : int
        G.
    config : LayerConfig
    draft_layers : sequence of LayerWeights
        As in `PartialDepthDecoder`, with the first rotary embedding; only with fused layers.
    """

    def __init__(
        self,
        layers: Sequence[HeldWeights],
        num_kv_heads: int,
        config: LayerConfig,
        draft_layers: Sequence[HeldWeights] = (),
    ) -> None:
        self.config = config
        self._all_tables: list[tuple[Tensor, Tensor]] = []
        inv_freq, scaling, _ = config.rotaries[0]
        super().__init__(layers, num_kv_heads, config.eps, inv_freq, scaling, draft_layers, config.max_positions)
        rotary_dim = config.rotary_dim
        self._order = None if rotary_dim is None else pair_order(rotary_dim, self.head_dim).to(self.device)
        self._rotary_index = [*(config.rotary_index or [0] * self.num_layers), *[0] * self.num_draft_layers]

    @property
    def ops(self) -> Ops:
        names = "exit_head", "accept_greedy", "accept_sampled"
        return {"partial_forward": self._partial_forward, **{name: partial(call, name) for name in names}}

    def new_cache(self, batch_size: int, capacity: int) -> SharedKVCache:
        if self.config.experts_per_token and self.device.type != "cpu":
            raise UnsupportedModelError(f"mixtures of experts are supported on the CPU, not yet on {self.device}")
        return super().new_cache(batch_size, capacity)

    def template(self, index: int) -> LayerWeights:
        if not self.config.fused:
            raise UnsupportedModelError(
                "an exit with draft layers is not supported for layers that are composed of small ops; one without is"
            )
        return super().template(index)

    def of(self, layers: Sequence[HeldWeights], draft_layers: Sequence[LayerWeights] = ()) -> GenericDecoder:
        return GenericDecoder(layers, self.num_kv_heads, self.config, draft_layers)

    def made(self, held: Mapping[str, Tensor]) -> Any:
        if self.config.fused:
            return super().made(held)
        parts, offset = parts_of(held, self.num_kv_heads * self.head_dim), self.config.norm_offset
        if offset:
            norms = {name: part for name, part in parts.items() if name.endswith("norm")}
            with torch.inference_mode(False), torch.no_grad():  # `refresh` writes to them in any mode
                parts |= {name: norm.float() + offset for name, norm in norms.items()}
        return GenericWeights(**parts)

    @torch.no_grad()
    def refresh(self) -> None:
        super().refresh()
        offset = self.config.norm_offset
        for number in range(self.num_layers if offset else 0):
            for name, weight in self.held(number).items():
                if name.endswith("norm"):
                    getattr(self._by_layer[number], name).copy_(weight.float() + offset)

    def forward(
        self,
        hidden: Tensor,
        cache: SharedKVCache,
        start: int = 0,
        end: int | None = None,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """As `PartialDepthDecoder.forward`; the state before layer 0 is the embedding, not yet scaled."""
        end = self.num_layers if end is None else end
        self._check(hidden, cache, start, end)
        with torch.no_grad():
            return self._run(hidden, self.kv_cache(cache, seq_lens, slots), start, end)

    def prefill_layer(
        self, number: int, weights: Any, hidden: Tensor, cache: SharedKVCache, past: int, watch: Watch | None = None
    ) -> Tensor:
        hidden = self._scaled(hidden) if number == 0 else hidden
        if self.config.fused:
            return super().prefill_layer(number, weights, hidden, cache, past, watch)
        return self._compute(number, weights, hidden, self.kv_cache(cache), MANY_ROWS, watch)

    def write_keys(self, hidden: Tensor, cache: SharedKVCache, layer: int, *args: Any, **named: Any) -> None:
        if not self.config.fused:
            raise UnsupportedModelError("layers that are composed of small ops do not write keys alone")
        super().write_keys(self._scaled(hidden) if layer == 0 else hidden, cache, layer, *args, **named)

    def tables_of(self, number: int) -> tuple[Tensor, Tensor]:
        return self._all_tables[self._rotary_index[number]]

    def _partial_forward(self, *args: Any) -> Tensor:
        """The op of that name for these layers; it has the weights already."""
        a = bind("partial_forward", *args)
        return self._run(a.hidden, KVCache(a.k_cache, a.v_cache, a.cos, a.sin, a.seq_lens, a.slots), a.start, a.end)

    def _run(self, hidden: Tensor, cache: KVCache, start: int, end: int) -> Tensor:
        if start == 0 < end:
            hidden = self._scaled(hidden)
        if not self.config.fused:
            for number in range(start, end):
                hidden = self._compute(number, self.layer(number), hidden, cache, FEW_ROWS)
            return hidden
        for _, run in groupby(range(start, end), self._rotary_index.__getitem__):
            numbers = list(run)
            first, last = numbers[0], numbers[-1] + 1
            cos, sin = self.tables_of(first)
            flat = self.layer_weights(first, last)
            hidden = partial_forward(hidden, flat, cache._replace(cos=cos, sin=sin), first, last, self.eps)
        return hidden

    def _compute(
        self, number: int, weights: Any, hidden: Tensor, cache: KVCache, kernels: Kernels, watch: Watch | None = None
    ) -> Tensor:
        """Layer ``number`` by small ops."""
        (cos, sin), windows = self.tables_of(number), self.config.windows
        own = KVCache(cache.k_cache[number], cache.v_cache[number], cos, sin, cache.seq_lens, cache.slots)
        window = windows[number] if windows else None
        return compute_layer(hidden, weights, own, self.config, window, self._order, kernels, watch)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """The embedding times its factor."""
        factor = self.config.embedding_scale
        if self.config.round_embedding_scale:
            factor = float(torch.tensor(factor).to(hidden.dtype))
        return hidden if factor == 1.0 else hidden * factor

    def _fields(self) -> Sequence[str]:
        return super()._fields() if self.config.fused else GenericWeights._fields

    def _check_weights(self) -> None:
        if self.config.fused:
            super()._check_weights()  # else the ops check them

    def _filled_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        self._all_tables = [one.tables(positions, self.max_positions, self.device) for one in self.config.rotaries]
        return self._all_tables[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GenericDecoder:
        super()._apply(fn, recurse)
        self._all_tables = [(cos.to(self.device), sin.to(self.device)) for cos, sin in self._all_tables]
        self._order = None if self._order is None else self._order.to(self.device)
        return self
