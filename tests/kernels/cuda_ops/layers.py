"""The ops of a decoder layer, emulated: `layerskip_kernels.functional` over tests/cuda_emulation/ops/layers.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import LayerWeights
from layerskip_kernels.formats import FORMATS, format_of, is_packed

WEIGHTS_PER_LAYER = len(LayerWeights._fields)
_PACKED = {name: 2 + place for place, name in enumerate(FORMATS)}


def code_of(weight: Tensor, width: int) -> int:
    """`Format` of csrc/common/weight.h: plain, the int8 rows of a draft head, or packed."""
    if weight.dtype == torch.int8:
        return 1
    return _PACKED[format_of(weight, width).name] if is_packed(weight) else 0


def codes_of(weights: Sequence[Tensor], each: int, hidden_size: int) -> Tensor:
    """Of the weights of layers, which have ``each``: fourteen a layer."""
    codes: list[int] = []
    for first in range(0, len(weights), each):
        own = dict(zip(LayerWeights._fields, weights[first : first + each], strict=False))
        widths = {"o": len(own["q"]), "down": len(own["gate"])}
        codes += [
            code_of(own[name], widths.get(name, hidden_size)) if name in own else 0 for name in LayerWeights._fields
        ]
    return torch.tensor(codes)


class EmulatedLayers:
    """What `Emulated` knows of layers; ``call`` is its own."""

    def call(self, file: str, entry: str, *args: Any, writes: list[Tensor]) -> None:
        raise NotImplementedError

    def _layers(self, entry: str, *args: Any, writes: Sequence[Tensor]) -> None:
        self.call("layers", entry, *args, writes=list(writes))

    def _memory(self, entry: str, *args: Any) -> Tensor:
        """The memory that an op asks for; its contents are garbage."""
        size = torch.zeros(1, dtype=torch.int64)
        self._layers(entry, size, *args, writes=(size,))
        return torch.full((int(size),), 0x7F, dtype=torch.uint8)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        rows, hidden_size = x.numel() // x.shape[-1], x.shape[-1]
        self._layers("rms_norm", x, weight, out, rows, hidden_size, eps, x.dtype, writes=(out,))
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        code = code_of(weight, x.shape[1])
        self._layers("linear", x, weight, bias, residual, out, *x.shape, weight.shape[0], code, x.dtype, writes=(out,))
        return out

    def swiglu(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], gate.shape[0])
        codes = [code_of(weight, x.shape[1]) for weight in (gate, up)]
        self._layers("swiglu", x, gate, up, out, *x.shape, gate.shape[0], *codes, x.dtype, writes=(out,))
        return out

    def rope_kv_append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        seq_lens: Tensor,
        slots: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(q)
        (batch, rows, num_heads, size), (num_slots, num_kv_heads, capacity) = q.shape, k_cache.shape[:3]
        self._layers(
            "rope_kv_append", q, k, v, cos, sin, k_cache, v_cache, seq_lens, slots, out, batch, rows, num_heads,
            num_kv_heads, size, capacity, num_slots, q.dtype, writes=(out, k_cache, v_cache),
        )  # fmt: skip
        return out

    def verify_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        seq_lens: Tensor,
        slots: Tensor | None = None,
        limit: int = 64 << 20,
    ) -> Tensor:
        """``limit``: bytes of scratch above which the rows are taken in several launches."""
        out = torch.empty_like(q)
        (batch, rows, num_heads, size), (num_slots, num_kv_heads, capacity) = q.shape, k_cache.shape[:3]
        memory = self._memory("attention_bytes", batch, rows, num_heads, num_kv_heads, size, capacity, limit)
        self._layers(
            "verify_attention", q, k_cache, v_cache, seq_lens, slots, out, memory, batch, rows, num_heads,
            num_kv_heads, size, capacity, limit, num_slots, q.dtype, writes=(out, memory),
        )  # fmt: skip
        return out

    def partial_forward(
        self,
        hidden: Tensor,
        weights: Sequence[Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        seq_lens: Tensor,
        start: int,
        end: int,
        eps: float,
        slots: Tensor | None = None,
        ahead: int = 0,
    ) -> Tensor:
        """Of layers [start, end), which must not be empty; rows lie ``ahead`` positions past ``seq_lens``."""
        out, each = torch.empty_like(hidden), len(weights) // (end - start)
        tensors: list[Tensor | None] = []
        for layer in range(end - start):
            own = [one if one.numel() else None for one in weights[layer * each : (layer + 1) * each]]
            tensors += [*own, *[None] * (WEIGHTS_PER_LAYER - each)]
        caches = [cache[layer] for layer in range(start, end) for cache in (k_cache, v_cache)]
        (batch, rows, hidden_size), (num_slots, num_kv_heads, capacity, size) = hidden.shape, k_cache.shape[1:]
        first = dict(zip(LayerWeights._fields, weights[:each], strict=False))
        num_heads, intermediate_size = len(first["q"]) // size, len(first["gate"])
        sizes = torch.tensor(
            [
                batch,
                rows,
                hidden_size,
                num_heads,
                num_kv_heads,
                size,
                intermediate_size,
                capacity,
                num_slots,
                end - start,
            ],
            dtype=torch.int64,
        )
        memory = self._memory("forward_bytes", sizes, hidden.dtype)
        self._layers(
            "partial_forward", hidden, tensors, codes_of(weights, each, hidden_size), caches, cos, sin, seq_lens, slots,
            out, memory, sizes, ahead, eps, hidden.dtype, writes=(out, memory, k_cache, v_cache),
        )  # fmt: skip
        return out
