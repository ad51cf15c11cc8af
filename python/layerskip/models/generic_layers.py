"""Layers made of the small ops, for architectures that `layerskip_kernels.partial_forward` does not compute.

A row's result does not depend on the rows beside it: the ops guarantee that, sums of two tensors round once per
element, and what torch computes in vectors is computed for each row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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

from .head import NormForm
from .hf_checks import UnsupportedModelError, unsupported
from .kv_cache import SharedKVCache
from .layers import HeldWeights, PartialDepthDecoder, Product, Watch, attend_prompt, parts_of, torch_linear
from .rotary import Rotary, max_positions, pair_order, rotary_of, rotations


@dataclass(frozen=True)
class Layout:
    """What a layer computes that `layerskip_kernels.partial_forward` does not.

    Attributes
    ----------
    norm_offset : float
        What is added to the weights of norms.
    gelu : bool
        The activation is the tanh form of GELU, not SiLU.
    rotated : int or None
        How many of a head's values are rotated; None for all.
    windows : tuple of int or None
        How many positions each layer sees, its own included; None for all.
    top_k : int
        How many experts each row has; 0 where there are none.
    shares : bool
        Whether the experts of a row share a weight of 1.
    """

    norm_offset: float = 0.0
    gelu: bool = False
    rotated: int | None = None
    windows: tuple[int | None, ...] = ()
    top_k: int = 0
    shares: bool = False


@dataclass(frozen=True)
class Form:
    """What a decoder and a head are made with, beside their weights.

    Attributes
    ----------
    eps : float
        Of every norm.
    rotaries : tuple of Rotary
    rotary_of : tuple of int
        Which of them each layer has; by default the first.
    max_positions : int or None
        How many positions are computed as the model does; None for any number.
    embedding_scale : float
        What the first layer multiplies its input by.
    rounds_scale : bool
        Whether that factor is rounded to the dtype of the states before.
    layout : Layout or None
        None where `layerskip_kernels.partial_forward` computes the layers.
    """

    eps: float
    rotaries: tuple[Rotary, ...]
    rotary_of: tuple[int, ...] = ()
    max_positions: int | None = None
    embedding_scale: float = 1.0
    rounds_scale: bool = False
    layout: Layout | None = None

    @property
    def one_call(self) -> bool:
        """Whether one op computes any number of these layers, and with embedding and head a whole round."""
        return self.layout is None and len(self.rotaries) == 1 and self.embedding_scale == 1.0


def llama(config: Any, module: Any) -> Form:
    """Pre-norm layers with one rotary embedding."""
    return Form(config.rms_norm_eps, (rotary_of(module),), max_positions=max_positions(config))


def smollm3(config: Any, module: Any) -> Form:
    """Some layers have no rotary embedding, which is one whose frequencies are 0."""
    rotary = rotary_of(module)
    none = Rotary(torch.zeros_like(rotary.inv_freq), 1.0)
    which = tuple(0 if uses else 1 for uses in config.no_rope_layers[: config.num_hidden_layers])
    return Form(config.rms_norm_eps, (rotary, none), which, max_positions(config))


def granite(config: Any, module: Any) -> Form:
    """Factors of embedding, attention, residuals and logits.

    With the residual's factor r and states that are all divided by r, a layer is h + f(norm(h)) as Llama's, for a norm
    does not see the scale of its input but in eps, which becomes eps / r². The attention's factor goes into the rotary
    tables, whose square multiplies the scores.
    """
    residual, scores = config.residual_multiplier, config.attention_multiplier
    for name, factor in (("residual_multiplier", residual), ("attention_multiplier", scores)):
        if factor <= 0:
            raise unsupported(f"{name} {factor}", "a factor above 0")
    return Form(
        config.rms_norm_eps / residual**2,
        (scaled(rotary_of(module), scores),),
        max_positions=max_positions(config),
        embedding_scale=config.embedding_multiplier / residual,
    )


def olmo2(config: Any, module: Any) -> Form:
    """Norms after attention and feed-forward instead of before, and over the whole width of q and k."""
    return Form(config.rms_norm_eps, (rotary_of(module),), max_positions=max_positions(config), layout=Layout())


def olmo3(config: Any, module: Any) -> Form:
    """As OLMo 2, with windows in some layers, which have a rotary embedding of their own."""
    rotaries, which, windows = _by_layer_type(config, module)
    return Form(config.rms_norm_eps, rotaries, which, layout=Layout(windows=windows))


def gemma3(config: Any, module: Any) -> Form:
    """Four norms a layer, whose weights are written less 1; two rotary embeddings; windows; GELU."""
    rotaries, which, windows = _by_layer_type(config, module)
    return Form(
        config.rms_norm_eps,
        tuple(scaled(rotary, config.query_pre_attn_scalar**-0.5) for rotary in rotaries),
        which,
        embedding_scale=config.hidden_size**0.5,
        rounds_scale=True,
        layout=Layout(norm_offset=1.0, gelu=True, windows=windows),
    )


def _by_layer_type(config: Any, module: Any) -> tuple[tuple[Rotary, ...], tuple[int, ...], tuple[int | None, ...]]:
    """Rotary embeddings, which of them each layer has, and its window, where these depend on the type of the layer."""
    if not hasattr(config, "rope_parameters"):
        raise unsupported(f"model_type {config.model_type!r} with a transformers older than 5", "transformers 5")
    kinds = sorted(set(config.layer_types))
    windows = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
    rotaries = tuple(rotary_of(module, f"{kind}_") for kind in kinds)
    return rotaries, tuple(map(kinds.index, config.layer_types)), windows


def mixtral(config: Any, module: Any) -> Form:
    """Experts in the place of the feed-forward."""
    return replace(llama(config, module), layout=Layout(top_k=config.num_experts_per_tok, shares=True))


def qwen3_moe(config: Any, module: Any) -> Form:
    """As Mixtral, where every layer has experts."""
    layout = Layout(top_k=config.num_experts_per_tok, shares=bool(config.norm_topk_prob))
    return replace(llama(config, module), layout=layout)


def phi3(config: Any, module: Any) -> Form:
    """As Llama, or with only some values of a head rotated."""
    form = llama(config, module)
    rotary = form.rotaries[0]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = 2 * rotary.inv_freq.numel()
    if rotated == size:
        return form
    return replace(form, rotaries=(rotations(rotary, size),), layout=Layout(rotated=rotated))


def granite_norm(config: Any) -> NormForm:
    """The factor of the logits goes into the final norm."""
    return NormForm(0.0, 1 / config.logits_scaling)


def gemma_norm(config: Any) -> NormForm:
    """Kept less 1."""
    return NormForm(1.0, 1.0)


def scaled(rotary: Rotary, factor: float) -> Rotary:
    """A rotary embedding that multiplies q · k by ``factor`` in the place of C^-½, which the ops multiply it by."""
    size = 2 * rotary.inv_freq.numel()
    return rotary._replace(scaling=rotary.scaling * math.sqrt(factor * math.sqrt(size)))


WINDOW_ROWS = 8  # whose windows are copied at a time


class ComposedWeights(NamedTuple):
    """The tensors of a layer; of each norm before and after attention and feed-forward there may be none.

    Shapes as in `layerskip_kernels.LayerWeights`, but that ``q_norm`` and ``k_norm`` may be as wide as all heads. In
    the place of ``gate``, ``up`` and ``down`` there may be N experts: ``router`` [N, D], ``experts_in`` [N, 2 F, D],
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
    """What computes products and attention: for a few rows, or for the many of a prompt.

    ``residual`` takes x, a weight and what is added; ``gated`` takes x, gate, up and whether the activation is GELU;
    ``attend`` takes q [B, M, H, C], the cache of one layer and the window, and gives [B, M, H, C].
    """

    product: Product
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    attend: Callable[[Tensor, KVCache, int | None], Tensor]


class LayerKind(NamedTuple):
    """How a layer computes: ``eps`` of norms; the window; the order of a head's values; the rest as in `Layout`."""

    eps: float
    window: int | None
    order: Tensor | None
    layout: Layout


def compute_layer(
    hidden: Tensor,
    weights: ComposedWeights,
    cache: KVCache,
    kind: LayerKind,
    kernels: Kernels,
    watch: Watch | None = None,
) -> Tensor:
    """The states [B, M, D] after a layer; keys and values are written into ``cache``, which is of this layer alone."""
    seen, w = watch or (lambda name, states: None), cast("Any", weights)  # some are there or not, as others are
    batch, rows, width = hidden.shape
    flat = hidden.reshape(-1, width)

    normed = _norm(flat, w.attn_norm, kind.eps)
    seen("attention", normed)
    heads = (batch, rows, -1, cache.k_cache.shape[3])
    q = _ordered(_norm_heads(kernels.product(normed, w.q, w.q_bias), w.q_norm, kind.eps).view(heads), kind.order)
    k = _ordered(_norm_heads(kernels.product(normed, w.k, w.k_bias), w.k_norm, kind.eps).view(heads), kind.order)
    v = kernels.product(normed, w.v, w.v_bias).view(heads)
    q = rope_kv_append(q, k, v, cache.cos, cache.sin, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)
    attended = kernels.attend(q, cache, kind.window).reshape(batch * rows, -1)
    seen("attended", attended)
    flat = _add(flat, attended, w.o, w.attn_post_norm, kind, kernels)

    normed = _norm(flat, w.mlp_norm, kind.eps)
    seen("feed-forward", normed)
    if w.router is not None:
        out = flat + _norm(_experts(normed, w, kind.layout, kernels), w.mlp_post_norm, kind.eps)
    else:
        inner = kernels.gated(normed, w.gate, w.up, kind.layout.gelu)
        seen("gated", inner)
        out = _add(flat, inner, w.down, w.mlp_post_norm, kind, kernels)
    return out.view(hidden.shape)


def _add(flat: Tensor, x: Tensor, weight: Tensor, norm: Tensor | None, kind: LayerKind, kernels: Kernels) -> Tensor:
    """flat + norm(x weightᵀ), with one rounding where there is no norm in between."""
    if norm is None:
        return kernels.residual(x, weight, flat)
    return flat + _norm(kernels.product(x, weight, None), norm, kind.eps)


def _experts(x: Tensor, w: Any, layout: Layout, kernels: Kernels) -> Tensor:
    """Each row's sum over its experts, from the first to the last, so that it does not depend on the other rows."""
    chances, chosen = kernels.product(x, w.router, None).float().softmax(-1).topk(layout.top_k)
    if layout.shares:
        chances = chances / reduce(torch.add, chances.unbind(1))[:, None]  # a sum in this order, whatever the rows
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        gate, up = w.experts_in[expert].chunk(2)
        done = kernels.product(kernels.gated(x[rows], gate, up, layout.gelu), w.experts_out[expert], None)
        out[rows] += (done * chances[rows, places, None]).to(x.dtype)
    return out


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Rounded once, at the end, where the weight is in fp32 and x is not."""
    if weight is None:
        return x
    return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)


def _norm_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Of each head, or of all together: as wide as the weight is."""
    return x if weight is None else _norm(x.view(x.shape[0], -1, weight.numel()), weight, eps)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x[..., order]


def _gelu(x: Tensor) -> Tensor:
    """The tanh form. On a CPU torch computes the end of a tensor in another way, so each row is taken alone."""
    if not x.is_cpu or not len(x):
        return F.gelu(x, approximate="tanh")
    return torch.stack([F.gelu(row, approximate="tanh") for row in x])


def attend(q: Tensor, cache: KVCache, window: int | None) -> Tensor:
    """Each row sees the positions up to its own, or the last ``window`` of them.

    A window is copied for each row, from its first position on: so the row's sum is the same whatever is beside it.
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
        own_keys, own_values = (_copied(half, slots[some, None], places) for half in (keys, values))
        parts.append(verify_attention(queries[some], own_keys, own_values, positions[some] - first[some]))
    return torch.cat(parts).view(q.shape)


def _copied(half: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """Some positions [R, W] of some rows [R, 1] of keys or values, [R, G, W, C]."""
    return half.transpose(1, 2)[slots, places].transpose(1, 2).contiguous()


def _is_reached(window: int, q: Tensor, cache: KVCache) -> bool:
    """Whether a row may be past the window. On a card a look at the lengths would be a synchronisation."""
    if cache.k_cache.shape[2] <= window or not q.numel():
        return False
    return not q.is_cpu or int(cache.seq_lens.max()) + q.shape[1] > window


def _attend_prompt(q: Tensor, cache: KVCache, window: int | None) -> Tensor:
    if window is not None:
        return attend(q, cache, window)
    return attend_prompt(q, cache.k_cache, cache.v_cache, cache.seq_lens, int(cache.seq_lens[0])).view(q.shape)


def _residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return linear(x, weight, residual=residual)


def _torch_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual + torch_linear(x, weight)


def _gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return _gelu(linear(x, gate)) * linear(x, up) if gelu else swiglu(x, gate, up)


def _torch_gated(x: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    gates = torch_linear(x, gate)
    return (F.gelu(gates, approximate="tanh") if gelu else F.silu(gates)) * torch_linear(x, up)


FEW_ROWS = Kernels(linear, _residual, _gated, attend)
MANY_ROWS = Kernels(torch_linear, _torch_residual, _torch_gated, _attend_prompt)


class ComposedDecoder(PartialDepthDecoder):
    """Layers of other forms than one: a call for each run of layers with one rotary embedding, or the small ops.

    Rounds are made of such calls, too (`ops`). All the rest is as in `PartialDepthDecoder`: one cache, rollback by a
    length, and for a row the same bits whatever is computed with it.

    Parameters
    ----------
    layers : sequence of mapping or LayerWeights
        As in `PartialDepthDecoder`; with a layout, the tensors of `ComposedWeights`.
    num_kv_heads : int
        G.
    form : Form
    draft_layers : sequence of LayerWeights
        As in `PartialDepthDecoder`, with the first rotary embedding; none with a layout.
    """

    def __init__(
        self, layers: Sequence[HeldWeights], num_kv_heads: int, form: Form, draft_layers: Sequence[HeldWeights] = ()
    ) -> None:
        self.form = form
        self._all_tables: list[tuple[Tensor, Tensor]] = []
        inv_freq, scaling, _ = form.rotaries[0]
        super().__init__(layers, num_kv_heads, form.eps, inv_freq, scaling, draft_layers, form.max_positions)
        layout = form.layout
        self._order: Tensor | None = None
        if layout is not None and layout.rotated is not None:
            self._order = pair_order(layout.rotated, self.head_dim).to(self.device)
        self._rotary_of = [*(form.rotary_of or [0] * self.num_layers), *[0] * self.num_draft_layers]

    @property
    def ops(self) -> Ops:
        """What drafts and rounds are made of, in the place of one call."""
        names = "exit_head", "accept_greedy", "accept_sampled"
        return {"partial_forward": self._partial_forward, **{name: partial(call, name) for name in names}}

    def new_cache(self, batch_size: int, capacity: int) -> SharedKVCache:
        """As in `PartialDepthDecoder`."""
        if self.form.layout is not None and self.form.layout.top_k and self.device.type != "cpu":
            raise UnsupportedModelError(f"mixtures of experts are supported on the CPU, not yet on {self.device}")
        return super().new_cache(batch_size, capacity)

    def template(self, index: int) -> LayerWeights:
        """As in `PartialDepthDecoder`; not with a layout."""
        if self.form.layout is not None:
            raise UnsupportedModelError(
                "an exit with draft layers is not supported for layers that are composed of small ops; one without is"
            )
        return super().template(index)

    def of(self, layers: Sequence[HeldWeights], draft_layers: Sequence[LayerWeights] = ()) -> ComposedDecoder:
        """As in `PartialDepthDecoder`."""
        return ComposedDecoder(layers, self.num_kv_heads, self.form, draft_layers)

    def made(self, held: Mapping[str, Tensor]) -> Any:
        """As in `PartialDepthDecoder`; with a layout `ComposedWeights`."""
        layout = self.form.layout
        if layout is None:
            return super().made(held)
        parts = parts_of(held, self.num_kv_heads * self.head_dim)
        if layout.norm_offset:
            norms = {name: part for name, part in parts.items() if name.endswith("norm")}
            with torch.inference_mode(False), torch.no_grad():  # `refresh` writes to them in any mode
                parts |= {name: norm.float() + layout.norm_offset for name, norm in norms.items()}
        return ComposedWeights(**parts)

    @torch.no_grad()
    def refresh(self) -> None:
        """As in `PartialDepthDecoder`; norms that are written in another way may have other values, too."""
        super().refresh()
        offset = 0.0 if self.form.layout is None else self.form.layout.norm_offset
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
        """As in `PartialDepthDecoder`. Before layer 0 the state is the embedding, not yet multiplied by its factor."""
        end = self.num_layers if end is None else end
        self._check(hidden, cache, start, end)
        with torch.no_grad():
            return self._run(hidden, self.kv_cache(cache, seq_lens, slots), start, end)

    def prefill_layer(
        self, number: int, weights: Any, hidden: Tensor, cache: SharedKVCache, past: int, watch: Watch | None = None
    ) -> Tensor:
        """As in `PartialDepthDecoder`."""
        hidden = self._scaled(hidden) if number == 0 else hidden
        if self.form.layout is None:
            return super().prefill_layer(number, weights, hidden, cache, past, watch)
        own = self._of_layer(self.kv_cache(cache), number)
        return compute_layer(hidden, weights, own, self._kind(number), MANY_ROWS, watch)

    def write_keys(self, hidden: Tensor, cache: SharedKVCache, layer: int, *args: Any, **named: Any) -> None:
        """As in `PartialDepthDecoder`; not with a layout."""
        if self.form.layout is not None:
            raise UnsupportedModelError("layers that are composed of small ops do not write keys alone")
        super().write_keys(self._scaled(hidden) if layer == 0 else hidden, cache, layer, *args, **named)

    def tables_of(self, number: int) -> tuple[Tensor, Tensor]:
        """As in `PartialDepthDecoder`."""
        return self._all_tables[self._rotary_of[number]]

    def _partial_forward(self, *args: Any) -> Tensor:
        """The op of that name for these layers; it has the weights already."""
        a = bind("partial_forward", *args)
        return self._run(a.hidden, KVCache(a.k_cache, a.v_cache, a.cos, a.sin, a.seq_lens, a.slots), a.start, a.end)

    def _run(self, hidden: Tensor, cache: KVCache, start: int, end: int) -> Tensor:
        if start == 0 < end:
            hidden = self._scaled(hidden)
        if self.form.layout is None:
            for first, last in self._runs(start, end):
                cos, sin = self.tables_of(first)
                flat = self.layer_weights(first, last)
                hidden = partial_forward(hidden, flat, cache._replace(cos=cos, sin=sin), first, last, self.eps)
            return hidden
        for number in range(start, end):
            weights: Any = self.layer(number)  # `made` has made them
            own = self._of_layer(cache, number)
            hidden = compute_layer(hidden, weights, own, self._kind(number), FEW_ROWS)
        return hidden

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Layers [start, end) in parts that have one rotary embedding."""
        for _, part in groupby(range(start, end), self._rotary_of.__getitem__):
            numbers = list(part)
            yield numbers[0], numbers[-1] + 1

    def _scaled(self, hidden: Tensor) -> Tensor:
        """The embedding times its factor."""
        factor = self.form.embedding_scale
        if self.form.rounds_scale:
            factor = float(torch.tensor(factor).to(hidden.dtype))
        return hidden if factor == 1.0 else hidden * factor

    def _of_layer(self, cache: KVCache, number: int) -> KVCache:
        cos, sin = self.tables_of(number)
        return KVCache(cache.k_cache[number], cache.v_cache[number], cos, sin, cache.seq_lens, cache.slots)

    def _kind(self, number: int) -> LayerKind:
        layout = self.form.layout
        assert layout is not None
        return LayerKind(self.eps, layout.windows[number] if layout.windows else None, self._order, layout)

    def _fields(self) -> Sequence[str]:
        return super()._fields() if self.form.layout is None else ComposedWeights._fields

    def _check_weights(self) -> None:
        if self.form.layout is None:
            super()._check_weights()  # else the ops check them

    def _filled_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        self._all_tables = [one.tables(positions, self.max_positions, self.device) for one in self.form.rotaries]
        return self._all_tables[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ComposedDecoder:
        super()._apply(fn, recurse)
        self._all_tables = [(cos.to(self.device), sin.to(self.device)) for cos, sin in self._all_tables]
        self._order = None if self._order is None else self._order.to(self.device)
        return self
