"""Layers that one call of `layerskip_kernels.partial_forward` does not compute, behind the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import KVCache, LayerWeights, partial_forward
from layerskip_kernels.composition import Ops
from layerskip_kernels.dispatch import call
from layerskip_kernels.schemas import bind

from .cache import SharedKVCache
from .composed_layer import FEW_ROWS, MANY_ROWS, ComposedWeights, LayerKind, compute_layer
from .form import Form
from .layers import PartialDepthDecoder
from .prefill import Watch
from .rotary import pair_order
from .unsupported import UnsupportedModelError
from .weights import HeldWeights, parts_of


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
    blocks : sequence of LayerWeights
        As in `PartialDepthDecoder`, with the first rotary embedding; none with a layout.
    """

    def __init__(
        self, layers: Sequence[HeldWeights], num_kv_heads: int, form: Form, blocks: Sequence[HeldWeights] = ()
    ) -> None:
        self.form = form
        self._all_tables: list[tuple[Tensor, Tensor]] = []
        inv_freq, scaling, _ = form.rotaries[0]
        super().__init__(layers, num_kv_heads, form.eps, inv_freq, scaling, blocks, form.max_positions)
        layout = form.layout
        self._order: Tensor | None = None
        if layout is not None and layout.rotated is not None:
            self._order = pair_order(layout.rotated, self.head_dim).to(self.device)
        self._rotary_of = [*(form.rotary_of or [0] * self.num_layers), *[0] * self.num_blocks]

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
                "an exit with blocks is not supported for layers that are composed of small ops; one without is"
            )
        return super().template(index)

    def of(self, layers: Sequence[HeldWeights], blocks: Sequence[LayerWeights] = ()) -> ComposedDecoder:
        """As in `PartialDepthDecoder`."""
        return ComposedDecoder(layers, self.num_kv_heads, self.form, blocks)

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
