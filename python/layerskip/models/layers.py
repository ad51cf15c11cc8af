"""Decoder layers, any range of which runs against one KV cache; prefill of prompts; weights by reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from layerskip_kernels import KVCache, LayerWeights, linear, partial_forward, rms_norm, rope_kv_append, verify_attention
from layerskip_kernels.formats import plain
from layerskip_kernels.functional import check_layer_weights
from layerskip_kernels.schemas import OPTIONAL_WEIGHTS, REQUIRED_WEIGHTS
from layerskip_kernels.speculative import Ops

from .head import reject_gradient, shared
from .kv_cache import SharedKVCache
from .rotary import Rotary

HeldWeights: TypeAlias = "LayerWeights | Mapping[str, Tensor]"
"""The tensors of a layer by name, as they are kept."""
JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""What some models keep as one parameter: the rows of one matrix behind those of the other."""


def present(layer: HeldWeights) -> dict[str, Tensor]:
    """The tensors that a layer has, by name."""
    named = layer._asdict() if isinstance(layer, LayerWeights) else layer
    return {name: weight for name, weight in named.items() if weight is not None}


def parts_of(held: Mapping[str, Tensor], keys: int) -> dict[str, Tensor]:
    """Split joined parameters into views of rows; ``keys`` is G C, the rows of k."""
    parts: dict[str, Tensor] = {}
    for name, weight in held.items():
        if name not in JOINED:
            parts[name] = weight
            continue
        rows = weight.shape[0]
        sizes = [rows - 2 * keys, keys, keys] if name == "qkv" else [rows // 2, rows - rows // 2]
        parts |= zip(JOINED[name], weight.detach().split(sizes), strict=True)
    return parts


INPUTS = {
    "q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attended",
    "gate": "feed-forward", "up": "feed-forward", "gate_up": "feed-forward", "down": "gated",
}  # fmt: skip
"""What each matrix of a layer is multiplied by, by names that `prefill_layer` tells. A layer has some of them."""
ATTENTION_ROWS = 64  # of one call on a CPU: its partial results stay in the caches

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [R, D], weight, bias) -> x @ weightᵀ + bias."""
Watch = Callable[[str, Tensor], None]
"""Called with a name in `INPUTS`, and what the matrices are multiplied by."""


def prefill_layer(
    hidden: Tensor,
    weights: LayerWeights,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    seq_lens: Tensor,
    past: int,
    eps: float,
    watch: Watch | None = None,
) -> Tensor:
    """Compute one layer as `layerskip_kernels.partial_forward` defines it, with torch's matmuls and attention.

    ``hidden`` is [B, N, D]; keys and values go to positions ``past`` to ``past + N - 1`` of the caches [B, G, T, C].
    ``seq_lens`` [B] equal ``past``, on the device. ``watch`` is called with the inputs of matmuls.
    """
    seen = watch or (lambda name, states: None)
    batch, rows, _ = hidden.shape
    head_dim = k_cache.shape[3]
    normed = rms_norm(hidden, weights.attn_norm, eps)
    seen("attention", normed)
    q = torch_linear(normed, weights.q, weights.q_bias).view(batch, rows, -1, head_dim)
    k = torch_linear(normed, weights.k, weights.k_bias).view(batch, rows, -1, head_dim)
    v = torch_linear(normed, weights.v, weights.v_bias).view(batch, rows, -1, head_dim)
    q = q if weights.q_norm is None else rms_norm(q, weights.q_norm, eps)
    k = k if weights.k_norm is None else rms_norm(k, weights.k_norm, eps)
    q = rope_kv_append(q, k, v, cos, sin, k_cache, v_cache, seq_lens)
    attended = attend_prompt(q, k_cache, v_cache, seq_lens, past)
    seen("attended", attended)
    hidden = hidden + torch_linear(attended, weights.o)
    normed = rms_norm(hidden, weights.mlp_norm, eps)
    seen("feed-forward", normed)
    gated = F.silu(torch_linear(normed, weights.gate)) * torch_linear(normed, weights.up)
    seen("gated", gated)
    return hidden + torch_linear(gated, weights.down)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weightᵀ + bias with torch; a packed weight is unpacked for this call."""
    return F.linear(x, plain(weight, x.shape[-1], x.dtype), bias)


def write_keys(hidden: Tensor, weights: LayerWeights, cache: KVCache, eps: float, product: Product) -> None:
    """Write the keys and values of one layer for states [B, N, D]; ``cache`` is of this layer alone."""
    batch, rows, _ = hidden.shape
    normed = rms_norm(hidden, weights.attn_norm, eps).flatten(0, 1)
    shape = (batch, rows, -1, cache.k_cache.shape[3])
    k = product(normed, weights.k, weights.k_bias).view(shape)
    v = product(normed, weights.v, weights.v_bias).view(shape)
    k = k if weights.k_norm is None else rms_norm(k, weights.k_norm, eps)
    rope_kv_append(k, k, v, cache.cos, cache.sin, cache.k_cache, cache.v_cache, cache.seq_lens, cache.slots)


def attend_prompt(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, past: int) -> Tensor:
    """Causal attention of q [B, N, H, C] over what the cache holds; [B, N, H C]."""
    if q.device.type == "cpu":
        # Torch's own is two to five times slower there: a mask keeps it from skipping what no row sees.
        return attend_in_pieces(q, k_cache, v_cache, seq_lens)
    return attend_masked(q, k_cache, v_cache, past)


def attend_in_pieces(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
    attended = [
        verify_attention(piece, k_cache, v_cache, seq_lens + i * ATTENTION_ROWS)
        for i, piece in enumerate(q.split(ATTENTION_ROWS, dim=1))
    ]
    return torch.cat(attended, dim=1).flatten(2)


def attend_masked(q: Tensor, k_cache: Tensor, v_cache: Tensor, past: int) -> Tensor:
    """Use torch's attention, up to the last valid position: a mask does not keep NaN beyond it out of V."""
    rows = q.shape[1]
    keys, values = k_cache[:, :, : past + rows], v_cache[:, :, : past + rows]
    # No tensor for a mask: that would rule out flash attention on a card.
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=causal_lower_right(rows, past + rows), enable_gqa=True
    )
    return attended.transpose(1, 2).flatten(2)


_growing = Lock()  # of tables, which several threads may find too short; a decoder that held it could not be copied


class PartialDepthDecoder(nn.Module):
    """The layers of a decoder; `forward` runs layers [start, end) as one fused call.

    The given tensors are kept, not copied: storage and in-place changes are shared with the model that they come from.

    Parameters
    ----------
    layers : sequence of LayerWeights, or of mapping
        At least one; all of one dtype and on one device. Shapes as in `layerskip_kernels.partial_forward`. A mapping
        has the same names, or those of `layerskip.models.layers.JOINED` for several matrices in one parameter.
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
        layers: Sequence[HeldWeights],
        num_kv_heads: int,
        eps: float,
        inv_freq: Tensor,
        attention_scaling: float = 1.0,
        draft_layers: Sequence[HeldWeights] = (),
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("a decoder needs at least one layer")
        if inv_freq.dtype != torch.float32 or inv_freq.dim() != 1:
            raise ValueError(f"inv_freq must be an fp32 vector, got {inv_freq.dtype} {list(inv_freq.shape)}")
        self.num_layers, self.num_draft_layers = len(layers), len(draft_layers)
        self.num_kv_heads, self.eps = num_kv_heads, float(eps)
        self.head_dim = 2 * inv_freq.numel()
        if self.head_dim % 8 or not 8 <= self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {self.head_dim}")
        self.layers = nn.ModuleList(_parameters(layer) for layer in (*layers, *draft_layers))
        # Plain attributes: a conversion of the module to bf16 must not round frequencies or tables.
        self.rotary = Rotary(inv_freq.detach().cpu(), float(attention_scaling))
        self._tables = (torch.empty(0, self.head_dim // 2),) * 2
        self.max_positions = max_positions
        self._list_weights()
        self.hidden_size = self._by_layer[0].o.shape[0]
        self.num_heads = self._by_layer[0].q.shape[0] // self.head_dim
        self._check_weights()
        self.register_load_state_dict_post_hook(lambda module, keys: module._list_weights())

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def with_draft_layers(self, draft_layers: Sequence[LayerWeights]) -> PartialDepthDecoder:
        """A decoder with the same layers, on the same storage, and an exit's draft layers."""
        return self.of([self.held(number) for number in range(self.num_layers)], draft_layers)

    def of(self, layers: Sequence[HeldWeights], draft_layers: Sequence[LayerWeights] = ()) -> PartialDepthDecoder:
        """A decoder of other layers, with the same eps and rotary embedding."""
        inv_freq, scaling, _ = self.rotary
        return PartialDepthDecoder(
            layers, self.num_kv_heads, self.eps, inv_freq, scaling, draft_layers, self.max_positions
        )

    def let_go(self) -> None:
        """Drop the lists of weights, so that parameters can be freed one by one; nothing can be computed then."""
        self._by_layer.clear()
        self._weights.clear()

    def new_cache(self, batch_size: int, capacity: int) -> SharedKVCache:
        """Make an empty cache [B, T] for layers and draft layers; the rotary tables grow to ``capacity``."""
        layers = self.num_layers + self.num_draft_layers
        cache = SharedKVCache(layers, batch_size, self.num_kv_heads, capacity, self.head_dim, self.dtype, self.device)
        with _growing:
            held = self._tables[0]
            if held.shape[0] < capacity or held.device != self.device:
                self._tables = self._filled_tables(max(capacity, held.shape[0]))
        return cache

    @property
    def inv_freq(self) -> Tensor:
        """Frequencies of the rotary embedding [C/2], fp32, on the CPU."""
        return self.rotary.inv_freq

    @property
    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """Cos and sin of the rotary embedding, [≥ T, C/2]; `new_cache` may put longer ones in their place."""
        return self._tables

    def tables_of(self, number: int) -> tuple[Tensor, Tensor]:
        """Cos and sin of one layer."""
        return self._tables

    @property
    def ops(self) -> Ops | None:
        """The ops that drafts and rounds are composed of; None if one call computes them."""
        return None

    def layer(self, index: int) -> LayerWeights:
        return self._by_layer[index]

    def template(self, index: int) -> LayerWeights:
        """The layer whose shapes an exit's draft layers must have."""
        return self.layer(index)

    def held(self, index: int) -> dict[str, Tensor]:
        """The parameters of one layer, some of them joined."""
        return dict(cast("nn.ParameterDict", self.layers[index]).items())

    def made(self, held: Mapping[str, Tensor]) -> LayerWeights:
        """The weights of a layer, of parameters as from `held`."""
        return LayerWeights(**parts_of(held, self.num_kv_heads * self.head_dim))

    def refresh(self) -> None:
        """List the parameters again if `layer` returns views, whose memory may have changed."""
        if self._has_views:
            self._list_weights()

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
            State before layer ``start``; row m of sequence b is at position ``seq_lens[b] + m``.
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
            return partial_forward(
                hidden, self.layer_weights(start, end), self.kv_cache(cache, seq_lens, slots), start, end, self.eps
            )

    def kv_cache(self, cache: SharedKVCache, seq_lens: Tensor | None = None, slots: Tensor | None = None) -> KVCache:
        """The cache and the rotary tables as the ops take them; by default with the cache's lengths."""
        lengths = cache.seq_lens if seq_lens is None else seq_lens
        return KVCache(cache.k, cache.v, *self._tables, lengths, slots)

    def prefill(self, hidden: Tensor, cache: SharedKVCache, start: int = 0, end: int | None = None) -> Tensor:
        """Run layers [start, end) on many rows, with torch's own matmuls and attention.

        For prompts, whose cost is arithmetic and not memory. The result equals that of `forward` up to rounding. The
        caller splits a long prompt into chunks, and advances the lengths after each.

        Parameters
        ----------
        hidden : Tensor [B, N, D]
            State before layer ``start``; row n is at position ``cache.seq_lens + n``.
        cache : SharedKVCache
        start, end : int
            By default all layers.

        Returns
        -------
        Tensor [B, N, D]

        Raises
        ------
        ValueError, TypeError
            As `forward`, and if the sequences of the cache differ in length.
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
        self,
        number: int,
        weights: LayerWeights,
        hidden: Tensor,
        cache: SharedKVCache,
        past: int,
        watch: Watch | None = None,
    ) -> Tensor:
        """One layer of `prefill`, after ``past`` positions, with the given weights."""
        keys, values, (cos, sin) = cache.k[number], cache.v[number], self.tables_of(number)
        return prefill_layer(hidden, weights, keys, values, cos, sin, cache.seq_lens, past, self.eps, watch)

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
        self._check(hidden, cache, layer, layer + 1)
        whole = self.kv_cache(cache, seq_lens, slots)
        cos, sin = self.tables_of(layer)
        own = whole._replace(k_cache=whole.k_cache[layer], v_cache=whole.v_cache[layer], cos=cos, sin=sin)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            write_keys(hidden, self._by_layer[layer], own, self.eps, product)

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

    def _filled_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        return self.rotary.tables(positions, self.max_positions, self.device)

    def _list_weights(self) -> None:
        """List the parameters in the op's order; the lists hold the objects, so they see in-place changes."""
        self._by_layer = [self.made(self.held(number)) for number in range(len(self.layers))]
        names = self._fields()
        first = self.held(0)
        self._has_views = not JOINED.keys().isdisjoint(first)
        self._like = next(weight for weight in first.values() if weight.dim() == 1)
        absent = torch.empty(0, dtype=self._like.dtype, device=self._like.device)
        flat = [getattr(layer, name) for layer in self._by_layer for name in names]
        self._per_layer = len(names)
        self._weights: list[Tensor] = [absent if weight is None else weight for weight in flat]

    def _fields(self) -> Sequence[str]:
        """The names of a layer's tensors in the op's order."""
        layers = map(self.held, range(len(self.layers)))
        has_optional = any(not held.keys().isdisjoint(OPTIONAL_WEIGHTS) for held in layers)
        return LayerWeights._fields if has_optional else REQUIRED_WEIGHTS

    def _check_weights(self) -> None:
        _check_layers(self._by_layer, self.hidden_size, self.num_kv_heads, self.head_dim)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PartialDepthDecoder:
        """Convert the module, and list its weights again: a conversion may replace parameters."""
        super()._apply(fn, recurse)
        self._list_weights()
        cos, sin = self._tables
        self._tables = cos.to(self.device), sin.to(self.device)
        return self


def _parameters(layer: HeldWeights) -> nn.ParameterDict:
    return nn.ParameterDict({name: shared(weight) for name, weight in present(layer).items()})


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
