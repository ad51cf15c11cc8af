"""Decoder layers, any range of which runs against one KV cache; prefill of prompts; weights by reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from threading import Lock
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from layerskip_kernels import KVCache, LayerWeights, linear, partial_forward, rms_norm, rope_kv_append
from layerskip_kernels.dispatch import call
from layerskip_kernels.functional import check_layer_weights
from layerskip_kernels.schemas import OPTIONAL_WEIGHTS, REQUIRED_WEIGHTS, bind
from layerskip_kernels.speculative import Ops

from .generic_layers import JOINED, GenericWeights, LayerConfig, Product, Watch, compute_layer, split_joined
from .head import reject_gradient, shared
from .hf_checks import UnsupportedModelError
from .kv_cache import SharedKVCache
from .rotary import Rotary, pair_order

NamedWeights: TypeAlias = "LayerWeights | Mapping[str, Tensor]"
"""The tensors of a layer by name, as they are stored; None for absent ones."""
_growing = Lock()  # of tables, which several threads may find too short; a decoder that held it could not be copied


class PartialDepthDecoder(nn.Module):
    """The layers of a decoder; `forward` runs layers [start, end) as one fused call.

    The given tensors are kept, not copied: storage and in-place changes are shared with the model that they come from.
    Layers of other architectures than Llama's come from `from_config`. They take one call for consecutive layers of one
    rotary embedding, or small ops; the promises are the same: one cache, rollback by a length, and the same bits for a
    row whatever is computed with it.

    Parameters
    ----------
    layers : sequence of LayerWeights, or of mapping
        At least one; all of one dtype and on one device. Shapes as in `layerskip_kernels.partial_forward`. A mapping
        has the same names, or those of `layerskip.models.generic_layers.JOINED` for several matrices in one parameter.
    num_kv_heads : int
        G.
    eps : float
        Of every norm.
    inv_freq : Tensor [C/2], fp32
        Frequencies of the rotary embedding; twice their number is the head size C.
    attention_scaling : float
        Factor of cos and sin.
    draft_layers : sequence of LayerWeights
        Of an exit: layers from L on, which run only when asked for.
    max_positions : int, optional
        The number of positions that are computed as the model does; later ones are NaN, so that no token follows.

    Raises
    ------
    ValueError, TypeError
        If a tensor has the wrong shape, dtype, stride or device; the message names the layer and the tensor.
    """

    def __init__(
        self,
        layers: Sequence[NamedWeights],
        num_kv_heads: int,
        eps: float,
        inv_freq: Tensor,
        attention_scaling: float = 1.0,
        draft_layers: Sequence[NamedWeights] = (),
        max_positions: int | None = None,
    ) -> None:
        if inv_freq.dtype != torch.float32 or inv_freq.dim() != 1:
            raise ValueError(f"inv_freq must be an fp32 vector, got {inv_freq.dtype} {list(inv_freq.shape)}")
        rotary = Rotary(inv_freq.detach().cpu(), float(attention_scaling))
        config = LayerConfig(float(eps), (rotary,), max_positions=max_positions)
        self._init(layers, num_kv_heads, config, draft_layers)

    @classmethod
    def from_config(
        cls,
        layers: Sequence[NamedWeights],
        num_kv_heads: int,
        config: LayerConfig,
        draft_layers: Sequence[NamedWeights] = (),
    ) -> PartialDepthDecoder:
        """Make a decoder of layers that compute as ``config`` says.

        Layers that are not fused have the tensors of `GenericWeights`. Draft layers have the first rotary embedding.
        """
        decoder = cls.__new__(cls)
        decoder._init(layers, num_kv_heads, config, draft_layers)
        return decoder

    def _init(
        self,
        layers: Sequence[NamedWeights],
        num_kv_heads: int,
        config: LayerConfig,
        draft_layers: Sequence[NamedWeights],
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("a decoder needs at least one layer")
        self.config = config
        self.num_layers, self.num_draft_layers = len(layers), len(draft_layers)
        self.num_kv_heads, self.eps, self.max_positions = num_kv_heads, config.eps, config.max_positions
        self.head_dim = 2 * config.rotaries[0].inv_freq.numel()
        if self.head_dim % 8 or not 8 <= self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {self.head_dim}")
        self.layers = nn.ModuleList(_parameters(layer) for layer in (*layers, *draft_layers))
        self._rotary_index = [*(config.rotary_index or [0] * self.num_layers), *[0] * self.num_draft_layers]
        # Not buffers: a conversion of the module to bf16 must not round tables.
        self._tables = [(torch.empty(0, self.head_dim // 2),) * 2 for _ in config.rotaries]
        self._order = None if config.rotary_dim is None else pair_order(config.rotary_dim, self.head_dim)
        self._list_weights()
        self.hidden_size = self._by_layer[0].o.shape[0]
        self.num_heads = self._by_layer[0].q.shape[0] // self.head_dim
        if config.fused:  # else the small ops check them
            _check_layers(self._by_layer, self.hidden_size, self.num_kv_heads, self.head_dim)
        self.register_load_state_dict_post_hook(lambda module, keys: module._list_weights())

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def with_layers(
        self, layers: Sequence[NamedWeights], draft_layers: Sequence[LayerWeights] = ()
    ) -> PartialDepthDecoder:
        """A decoder of other layers that compute in the same way."""
        return self.from_config(layers, self.num_kv_heads, self.config, draft_layers)

    def with_draft_layers(self, draft_layers: Sequence[LayerWeights]) -> PartialDepthDecoder:
        """A decoder with the same layers, on the same storage, and an exit's draft layers."""
        return self.with_layers([self.layer_parameters(number) for number in range(self.num_layers)], draft_layers)

    def release_weights(self) -> None:
        """Drop the lists of weights, so that parameters can be freed one by one; nothing can be computed then."""
        self._by_layer.clear()
        self._weights.clear()

    def new_cache(self, batch_size: int, capacity: int) -> SharedKVCache:
        """Make an empty cache [B, T] for layers and draft layers; the rotary tables grow to ``capacity``."""
        if self.config.experts_per_token and self.device.type != "cpu":
            raise UnsupportedModelError(f"mixtures of experts are supported on the CPU, not yet on {self.device}")
        layers = self.num_layers + self.num_draft_layers
        cache = SharedKVCache(layers, batch_size, self.num_kv_heads, capacity, self.head_dim, self.dtype, self.device)
        with _growing:
            first = self._tables[0][0]
            if first.shape[0] < capacity or first.device != self.device:
                positions = max(capacity, first.shape[0])
                self._tables = [
                    rotary.tables(positions, self.max_positions, self.device) for rotary in self.config.rotaries
                ]
        return cache

    @property
    def inv_freq(self) -> Tensor:
        """Frequencies of the first rotary embedding [C/2], fp32, on the CPU."""
        return self.config.rotaries[0].inv_freq

    @property
    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """Cos and sin of the first rotary embedding, [≥ T, C/2]; `new_cache` may put longer ones in their place."""
        return self._tables[0]

    @property
    def ops(self) -> Ops | None:
        """The ops that drafts and rounds are composed of; None if one call computes them."""
        if self.config.one_call:
            return None
        names = "exit_head", "accept_greedy", "accept_sampled"
        return {"partial_forward": self._partial_forward, **{name: partial(call, name) for name in names}}

    def layer(self, index: int) -> LayerWeights:
        return self._by_layer[index]

    def template(self, index: int) -> LayerWeights:
        """The layer whose shapes an exit's draft layers must have."""
        if not self.config.fused:
            raise UnsupportedModelError(
                "an exit with draft layers is not supported for layers that are composed of small ops; one without is"
            )
        return self._by_layer[index]

    def layer_parameters(self, index: int) -> dict[str, Tensor]:
        """The parameters of one layer, some of them joined."""
        return dict(cast("nn.ParameterDict", self.layers[index]).items())

    def make_weights(self, parameters: Mapping[str, Tensor]) -> Any:
        """The weights of a layer, of parameters as from `layer_parameters`."""
        parts = split_joined(parameters, self.num_kv_heads * self.head_dim)
        if self.config.fused:
            return LayerWeights(**parts)
        if offset := self.config.norm_offset:
            norms = {name: part for name, part in parts.items() if name.endswith("norm")}
            with torch.inference_mode(False), torch.no_grad():  # `refresh` writes to them in any mode
                parts |= {name: norm.float() + offset for name, norm in norms.items()}
        return GenericWeights(**parts)

    @torch.no_grad()
    def refresh(self) -> None:
        """Update views of weights whose memory, and norms whose values, may have changed."""
        if self._has_views:
            self._list_weights()
        offset = self.config.norm_offset
        for number in range(self.num_layers if offset else 0):
            for name, weight in self.layer_parameters(number).items():
                if name.endswith("norm"):
                    getattr(self._by_layer[number], name).copy_(weight.float() + offset)

    def layer_weights(self, start: int, end: int) -> list[Tensor]:
        """The weights of layers [start, end) as `layerskip_kernels.partial_forward` takes them."""
        return self._weights[start * self._per_layer : end * self._per_layer]

    @property
    def draft_layer_weights(self) -> list[Tensor]:
        return self.layer_weights(self.num_layers, self.num_layers + self.num_draft_layers)

    def forward(
        self,
        hidden: Tensor,
        cache: SharedKVCache,
        start: int = 0,
        end: int | None = None,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Run layers [start, end) on M rows of each sequence, fused; keys and values are written into the cache.

        The result of a row is bitwise the same however many rows are computed with it. Lengths are not advanced.

        Parameters
        ----------
        hidden : Tensor [B, M, D]
            State before layer ``start``, which for layer 0 is the embedding as `LayerSkipModel.embed` returns it; row
            m of sequence b is at position ``seq_lens[b] + m``.
        cache : SharedKVCache
            Of `new_cache`.
        start, end : int
            By default all layers; from L on they are draft layers.
        seq_lens : Tensor [B], int64, optional
            By default the cache's.
        slots : Tensor [B], int64, optional
            The cache row of each sequence; by default sequence b has row b.

        Returns
        -------
        Tensor [B, M, D]
            State after layer ``end - 1``.

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype, device or layer is wrong, the rows do not fit into the cache, or ``hidden`` asks for a
            gradient.
        """
        end = self.num_layers if end is None else end
        self._check(hidden, cache, start, end)
        with torch.no_grad():
            return self._run(hidden, self.kv_cache(cache, seq_lens, slots), start, end)

    def kv_cache(self, cache: SharedKVCache, seq_lens: Tensor | None = None, slots: Tensor | None = None) -> KVCache:
        """The cache and the rotary tables as the ops take them; by default with the cache's lengths."""
        lengths = cache.seq_lens if seq_lens is None else seq_lens
        return KVCache(cache.k, cache.v, *self._tables[0], lengths, slots)

    def prefill(self, hidden: Tensor, cache: SharedKVCache, start: int = 0, end: int | None = None) -> Tensor:
        """Run layers [start, end) on many rows, with torch's own matmuls and attention.

        For prompts, whose cost is arithmetic and not memory. The result equals that of `forward` up to rounding. The
        caller splits a long prompt into chunks, and advances the lengths after each. Parameters and errors as in
        `forward`, but ``hidden`` is [B, N, D], and all sequences of the cache have one length.
        """
        end = self.num_layers if end is None else end
        self._check(hidden, cache, start, end)
        past = _common_length(cache)
        rows = hidden.shape[1]
        if past + rows > cache.capacity:
            raise ValueError(f"{rows} rows after {past} positions do not fit a cache of capacity {cache.capacity}")
        if self.max_positions is not None and past + rows > self.max_positions:
            raise ValueError(f"{rows} rows after {past} positions are more than the {self.max_positions} of the window")
        if rows == 0:
            return hidden.clone()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for layer in range(start, end):
                hidden = self.prefill_layer(layer, self._by_layer[layer], hidden, cache, past)
        return hidden

    def prefill_layer(
        self, number: int, weights: Any, hidden: Tensor, cache: SharedKVCache, past: int, watch: Watch | None = None
    ) -> Tensor:
        """One layer of `prefill`, after ``past`` positions, with the given weights."""
        hidden = self._scaled(hidden) if number == 0 else hidden
        return self._compute(number, weights, hidden, self.kv_cache(cache), past, watch)

    def write_keys(
        self,
        hidden: Tensor,
        cache: SharedKVCache,
        layer: int,
        product: Product = linear,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """Write only the keys and values of layer ``layer``, for rows that only later ones attend to.

        ``product`` is `layerskip_kernels.linear`, with the bits of `forward`, or torch's, for the many rows of a
        prompt.
        """
        if not self.config.fused:
            raise UnsupportedModelError("layers that are composed of small ops do not write keys alone")
        self._check(hidden, cache, layer, layer + 1)
        hidden = self._scaled(hidden) if layer == 0 else hidden
        own, weights = self._of_layer(self.kv_cache(cache, seq_lens, slots), layer), self._by_layer[layer]
        heads = (*hidden.shape[:2], -1, self.head_dim)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            normed = rms_norm(hidden, weights.attn_norm, self.eps).flatten(0, 1)
            k = product(normed, weights.k, weights.k_bias).view(heads)
            v = product(normed, weights.v, weights.v_bias).view(heads)
            k = k if weights.k_norm is None else rms_norm(k, weights.k_norm, self.eps)
            rope_kv_append(k, k, v, own.cos, own.sin, own.k_cache, own.v_cache, own.seq_lens, own.slots)

    def _partial_forward(self, *args: Any) -> Tensor:
        """The op of that name for these layers; it has the weights already."""
        a = bind("partial_forward", *args)
        return self._run(a.hidden, KVCache(a.k_cache, a.v_cache, a.cos, a.sin, a.seq_lens, a.slots), a.start, a.end)

    def _run(self, hidden: Tensor, cache: KVCache, start: int, end: int) -> Tensor:
        if self.config.one_call:
            return partial_forward(hidden, self.layer_weights(start, end), cache, start, end, self.eps)
        if start == 0 < end:
            hidden = self._scaled(hidden)
        if not self.config.fused:
            for number in range(start, end):
                hidden = self._compute(number, self._by_layer[number], hidden, cache)
            return hidden
        for index, run in groupby(range(start, end), self._rotary_index.__getitem__):
            numbers = list(run)
            first, last = numbers[0], numbers[-1] + 1
            cos, sin = self._tables[index]
            flat = self.layer_weights(first, last)
            hidden = partial_forward(hidden, flat, cache._replace(cos=cos, sin=sin), first, last, self.eps)
        return hidden

    def _compute(
        self,
        number: int,
        weights: Any,
        hidden: Tensor,
        cache: KVCache,
        past: int | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Layer ``number`` by small ops."""
        window = self.config.windows[number] if self.config.windows else None
        own = self._of_layer(cache, number)
        return compute_layer(hidden, weights, own, self.config, window, self._order, past, watch)

    def _of_layer(self, cache: KVCache, number: int) -> KVCache:
        """The part of the cache and the rotary tables of one layer."""
        cos, sin = self._tables[self._rotary_index[number]]
        return cache._replace(k_cache=cache.k_cache[number], v_cache=cache.v_cache[number], cos=cos, sin=sin)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """The embedding times its factor."""
        factor = self.config.embedding_scale
        if self.config.round_embedding_scale:
            factor = float(torch.tensor(factor).to(hidden.dtype))
        return hidden if factor == 1.0 else hidden * factor

    def _check(self, hidden: Tensor, cache: SharedKVCache, start: int, end: int) -> None:
        """Check what the op cannot; called for every draft token."""
        reject_gradient(hidden)
        if not 0 <= start <= end <= len(self._by_layer):
            draft_layers = f" and {self.num_draft_layers} draft layers" if self.num_draft_layers else ""
            raise ValueError(f"layers [{start}, {end}) are not within the decoder's {self.num_layers}{draft_layers}")
        if hidden.dim() != 3 or hidden.shape[2] != self.hidden_size:
            raise ValueError(f"hidden has shape {list(hidden.shape)}, expected [*, *, {self.hidden_size}]")
        if hidden.dtype != self.dtype:
            raise TypeError(f"hidden has dtype {hidden.dtype}, the decoder {self.dtype}")
        if cache.k.shape[2] != self.num_kv_heads or cache.k.shape[4] != self.head_dim:
            raise ValueError(
                f"the cache has {cache.k.shape[2]} heads of size {cache.k.shape[4]}, "
                f"the decoder {self.num_kv_heads} of size {self.head_dim}"
            )

    def _list_weights(self) -> None:
        """List the parameters in the op's order; the lists hold the objects, so they see in-place changes."""
        parameters = [self.layer_parameters(number) for number in range(len(self.layers))]
        self._by_layer = [self.make_weights(layer) for layer in parameters]
        self._has_views = not JOINED.keys().isdisjoint(parameters[0])
        self._like = next(weight for weight in parameters[0].values() if weight.dim() == 1)
        self._order = None if self._order is None else self._order.to(self.device)
        has_optional = any(not layer.keys().isdisjoint(OPTIONAL_WEIGHTS) for layer in parameters)
        names = LayerWeights._fields if has_optional else REQUIRED_WEIGHTS
        if not self.config.fused:
            names = GenericWeights._fields
        absent = torch.empty(0, dtype=self._like.dtype, device=self._like.device)
        flat = [getattr(layer, name) for layer in self._by_layer for name in names]
        self._per_layer = len(names)
        self._weights: list[Tensor] = [absent if weight is None else weight for weight in flat]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PartialDepthDecoder:
        """Convert the module, and list its weights again: a conversion may replace parameters."""
        super()._apply(fn, recurse)
        self._list_weights()
        self._tables = [(cos.to(self.device), sin.to(self.device)) for cos, sin in self._tables]
        return self


def _parameters(layer: NamedWeights) -> nn.ParameterDict:
    named = layer._asdict() if isinstance(layer, LayerWeights) else layer
    return nn.ParameterDict({name: shared(weight) for name, weight in named.items() if weight is not None})


def _check_layers(layers: Sequence[LayerWeights], hidden_size: int, num_kv_heads: int, head_dim: int) -> None:
    first = layers[0]
    absent = first.attn_norm.new_empty(0)
    for number, layer in enumerate(layers):
        try:
            given = [absent if weight is None else weight for weight in layer]
            check_layer_weights(given, hidden_size, num_kv_heads, head_dim, first.attn_norm.dtype)
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {number}: {error}") from None
        for name, weight in layer._asdict().items():
            if weight is not None and weight.device != first.q.device:
                raise ValueError(f"layer {number}: {name} is on {weight.device}, layer 0 on {first.q.device}")
        if layer.q.shape[0] != first.q.shape[0] or layer.gate.shape[0] != first.gate.shape[0]:
            raise ValueError(f"layer {number} has other shapes than layer 0")


def _common_length(cache: SharedKVCache) -> int:
    lengths = cache.seq_lens.tolist()
    if len(set(lengths)) != 1:
        raise ValueError(f"prefill takes sequences of one length, these have {lengths}")
    return lengths[0]
