"""A pre-norm decoder that runs any range of its layers against one cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from layerskip_kernels import (
    Draft,
    Head,
    KVCache,
    LayerWeights,
    Noise,
    Round,
    draft,
    partial_forward,
    speculative_round,
)
from layerskip_kernels.bundles import OPTIONAL_WEIGHTS, REQUIRED_WEIGHTS
from layerskip_kernels.functional import check_layer_weights

from ._prefill import prefill_layer
from ._weights import reject_gradient, shared
from .cache import SharedKVCache
from .head import EarlyExitHead


class PartialDepthDecoder(nn.Module):
    """The layers of a decoder; `forward` runs layers [start, end) as one fused call.

    Parameters are kept as they are given, so that the decoder shares the storage of the model it was made from, and
    sees changes made to it in place.

    Parameters
    ----------
    layers : sequence of LayerWeights
        At least one; all of one dtype and on one device. Shapes as in `layerskip_kernels.partial_forward`.
    num_kv_heads : int
        G.
    eps : float
        Of every norm.
    inv_freq : Tensor [C/2], fp32
        Frequencies of the rotary embedding; they fix the head size C.
    attention_scaling : float
        Factor of cos and sin.

    Raises
    ------
    ValueError, TypeError
        If a tensor has the wrong shape, dtype, stride or device; the message names the layer and the tensor.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        num_kv_heads: int,
        eps: float,
        inv_freq: Tensor,
        attention_scaling: float = 1.0,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("a decoder needs at least one layer")
        if inv_freq.dtype != torch.float32 or inv_freq.dim() != 1:
            raise ValueError(f"inv_freq must be an fp32 vector, got {inv_freq.dtype} {list(inv_freq.shape)}")
        self.num_layers, self.num_kv_heads, self.eps = len(layers), num_kv_heads, float(eps)
        self.head_dim = 2 * inv_freq.numel()
        if self.head_dim % 8 or not 8 <= self.head_dim <= 256:
            raise ValueError(f"head size must be a multiple of 8 up to 256, got {self.head_dim}")
        self.hidden_size = layers[0].attn_norm.numel()
        self.num_heads = layers[0].q.shape[0] // self.head_dim
        _check_layers(layers, self.hidden_size, num_kv_heads, self.head_dim)
        self.layers = nn.ModuleList(_hold(layer) for layer in layers)
        # Plain attributes: a conversion of the module to bf16 must not round frequencies or tables.
        self._inv_freq, self._attention_scaling = inv_freq.detach().cpu(), float(attention_scaling)
        self._cos = self._sin = torch.empty(0, self.head_dim // 2)
        self._has_optional = any(getattr(layer, name) is not None for layer in layers for name in OPTIONAL_WEIGHTS)
        self._collect()
        self.register_load_state_dict_post_hook(lambda module, keys: module._collect())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, states and cache."""
        return self._weights[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._weights[0].device

    def new_cache(self, batch_size: int, capacity: int) -> SharedKVCache:
        """An empty cache for this decoder; the tables of the rotary embedding grow to ``capacity``.

        Parameters
        ----------
        batch_size, capacity : int
            B and T.
        """
        cache = SharedKVCache(
            self.num_layers, batch_size, self.num_kv_heads, capacity, self.head_dim, self.dtype, self.device
        )
        if self._cos.shape[0] < capacity or self._cos.device != self.device:
            self._fill_tables(max(capacity, self._cos.shape[0]))
        return cache

    @property
    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """Cos and sin of the rotary embedding, [≥ T, C/2]; `new_cache` may put longer ones in their place."""
        return self._cos, self._sin

    def layer_weights(self, start: int, end: int) -> list[Tensor]:
        """The weights of layers [start, end) as `layerskip_kernels.partial_forward` takes them."""
        return self._weights[start * self._slots : end * self._slots]

    def forward(
        self,
        hidden: Tensor,
        cache: SharedKVCache,
        start: int = 0,
        end: int | None = None,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Layers [start, end) on M rows a sequence, fused; keys and values are written into the cache.

        What a row yields does not depend, bitwise, on how many rows travel with it. Lengths are not advanced.

        Parameters
        ----------
        hidden : Tensor [B, M, D]
            State before layer ``start``; row m of sequence b is at position ``seq_lens[b] + m``.
        cache : SharedKVCache
            Of `new_cache`.
        start, end : int
            By default all layers.
        seq_lens : Tensor [B], int64, optional
            By default the cache's.
        slots : Tensor [B], int64, optional
            The cache's row of each sequence; by default they are its rows, in order.

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
                hidden, self.layer_weights(start, end), self._places(cache, seq_lens, slots), start, end, self.eps
            )

    def draft(
        self,
        token: Tensor,
        embedding: Tensor,
        cache: SharedKVCache,
        end: int,
        head: EarlyExitHead,
        steps: int,
        extend: bool = True,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
        temperature: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Draft:
        """Decode ``steps`` tokens with layers [0, end) and ``head``, fused. Lengths are not advanced.

        Parameters
        ----------
        token : Tensor [B], int64
            The last tokens, at positions ``seq_lens``.
        embedding : Tensor [V, D]
        cache : SharedKVCache
        end : int
            The exit layer.
        head : EarlyExitHead
        steps : int
            K.
        extend : bool
            Whether the last token, too, goes through the layers, as verification needs it.
        seq_lens, slots : Tensor [B], int64, optional
            As in `forward`.
        temperature, seed : Tensor [B], optional
            Draw instead of taking the arg-max, as in `layerskip_kernels.draft`.

        Returns
        -------
        Draft
            Tokens [B, K], states [B, K + extend, D], and the tokens' probabilities [B, K].

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype, device or layer is wrong, or the rows do not fit into the cache.
        """
        self._check_exit(end, head)
        with torch.no_grad():
            return draft(
                token, embedding, self.layer_weights(0, end), self._places(cache, seq_lens, slots), end,
                Head(head.norm_weight, head.head_weight, head.token_map, head.scale), steps, extend=extend,
                eps=self.eps, noise=_noise(temperature, seed),
            )  # fmt: skip

    def speculate(
        self,
        token: Tensor,
        embedding: Tensor,
        cache: SharedKVCache,
        exit_layer: int,
        head: EarlyExitHead,
        draft_head: EarlyExitHead,
        steps: int,
        seq_lens: Tensor,
        slots: Tensor | None = None,
        min_probability: float = 0.0,
        temperature: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Round:
        """One round as one call: draft with layers [0, E), verify with layers [E, L), accept, advance the lengths.

        Parameters
        ----------
        token : Tensor [B], int64
            The last tokens, at positions ``seq_lens``.
        embedding : Tensor [V, D]
        cache : SharedKVCache
        exit_layer : int
            E.
        head, draft_head : EarlyExitHead
            What verifies, and what drafts, which may be approximate.
        steps : int
            K.
        seq_lens : Tensor [B], int64
            Advanced in place.
        slots, min_probability, temperature, seed
            As in `layerskip_kernels.speculative_round`.

        Returns
        -------
        Round
            Tokens [B, K], how many are accepted [B], the token that follows them [B], probabilities [B, K].

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype, device or layer is wrong, or the rows do not fit into the cache.
        """
        self._check_exit(exit_layer, draft_head)
        norm, small = head.norm_weight, None
        if draft_head is not head:
            small = Head(norm, draft_head.head_weight, draft_head.token_map, draft_head.scale)
        with torch.no_grad():
            return speculative_round(
                token, embedding, self._weights, self._places(cache, seq_lens, slots), exit_layer,
                Head(norm, head.head_weight), steps, draft_head=small, draft_threshold=min_probability, eps=self.eps,
                noise=_noise(temperature, seed),
            )  # fmt: skip

    def _places(self, cache: SharedKVCache, seq_lens: Tensor | None, slots: Tensor | None) -> KVCache:
        lengths = cache.seq_lens if seq_lens is None else seq_lens
        return KVCache(cache.k, cache.v, self._cos, self._sin, lengths, slots)

    def _check_exit(self, end: int, head: EarlyExitHead) -> None:
        if head.eps != self.eps:
            raise ValueError(f"the head's eps is {head.eps}, the decoder's {self.eps}; a draft takes one for both")
        if not 1 <= end <= self.num_layers:
            raise ValueError(f"layers [0, {end}) are not within the decoder's {self.num_layers}")

    def prefill(self, hidden: Tensor, cache: SharedKVCache, start: int = 0, end: int | None = None) -> Tensor:
        """Layers [start, end) on many rows, with torch's own matmuls and attention.

        For prompts, where arithmetic and not memory is what costs. The result equals `forward`'s up to rounding. The
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
        if rows == 0:
            return hidden.clone()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for layer in range(start, end):
                weights = self._by_layer[layer]
                hidden = prefill_layer(
                    hidden,
                    weights,
                    cache.k[layer],
                    cache.v[layer],
                    self._cos,
                    self._sin,
                    cache.seq_lens,
                    past,
                    self.eps,
                )
        return hidden

    def _check(self, hidden: Tensor, cache: SharedKVCache, start: int, end: int) -> None:
        """What the op cannot see for itself; called for every drafted token, so it is kept short."""
        reject_gradient(hidden)
        if not 0 <= start <= end <= self.num_layers:
            raise ValueError(f"layers [{start}, {end}) are not within the decoder's {self.num_layers}")
        if hidden.dim() != 3 or hidden.shape[2] != self.hidden_size:
            raise ValueError(f"hidden has shape {list(hidden.shape)}, expected [*, *, {self.hidden_size}]")
        if hidden.dtype != self.dtype:
            raise TypeError(f"hidden has dtype {hidden.dtype}, the decoder {self.dtype}")
        if cache.k.shape[2] != self.num_kv_heads or cache.k.shape[4] != self.head_dim:
            raise ValueError(
                f"the cache has {cache.k.shape[2]} heads of size {cache.k.shape[4]}, "
                f"the decoder {self.num_kv_heads} of size {self.head_dim}"
            )

    def _fill_tables(self, positions: int) -> None:
        """Cos and sin of position times frequency, in fp32, [positions, C/2]."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._inv_freq
        self._cos = (angles.cos() * self._attention_scaling).to(self.device)
        self._sin = (angles.sin() * self._attention_scaling).to(self.device)

    def _collect(self) -> None:
        """List the parameters flat, in the op's order; the objects themselves, so that the lists follow them."""
        held = cast("Iterable[nn.ParameterDict]", self.layers)
        self._by_layer = [LayerWeights(**dict(layer.items())) for layer in held]
        names = LayerWeights._fields if self._has_optional else REQUIRED_WEIGHTS
        first = self._by_layer[0].q
        absent = torch.empty(0, dtype=first.dtype, device=first.device)
        flat = [getattr(layer, name) for layer in self._by_layer for name in names]
        self._slots = len(names)
        self._weights: list[Tensor] = [absent if weight is None else weight for weight in flat]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PartialDepthDecoder:
        """Conversions may put new parameters in the place of the old ones."""
        super()._apply(fn, recurse)
        self._collect()
        self._cos, self._sin = self._cos.to(self.device), self._sin.to(self.device)
        return self


def _noise(temperature: Tensor | None, seed: Tensor | None) -> Noise | None:
    """Both or none; the op refuses one without the other."""
    return None if temperature is None and seed is None else Noise(temperature, seed)  # type: ignore[arg-type]


def _hold(layer: LayerWeights) -> nn.ParameterDict:
    return nn.ParameterDict({name: shared(weight) for name, weight in layer._asdict().items() if weight is not None})


def _check_layers(layers: Sequence[LayerWeights], hidden: int, groups: int, size: int) -> None:
    first = layers[0]
    absent = first.q.new_empty(0)
    for number, layer in enumerate(layers):
        try:
            check_layer_weights(
                [absent if weight is None else weight for weight in layer], hidden, groups, size, first.q.dtype
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {number}: {error}") from None
        for name, weight in layer._asdict().items():
            if weight is not None and weight.device != first.q.device:
                raise ValueError(f"layer {number}: {name} is on {weight.device}, layer 0 on {first.q.device}")
        if layer.q.shape != first.q.shape or layer.gate.shape != first.gate.shape:
            raise ValueError(f"layer {number} has other shapes than layer 0")


def _common_length(cache: SharedKVCache) -> int:
    lengths = cache.seq_lens.tolist()
    if len(set(lengths)) != 1:
        raise ValueError(f"prefill takes sequences of one length, these have {lengths}")
    return lengths[0]
