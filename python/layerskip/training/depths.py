"""The states of a model after each of its layers, and their logits: of a model of transformers, and of this library."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import rms_norm
from layerskip_kernels.formats import plain

from ..models import LayerSkipModel


class Depths(Protocol):
    """What an evaluation asks of a model."""

    def states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """The normed states [B, S, D] of input_ids [B, S] after so many layers, by their number."""

    def logits(self, rows: Tensor) -> Tensor:
        """[R, D], normed → [R, V]."""


def depths_of(model: Any) -> Depths:
    """Those of a model of either kind."""
    return DecoderDepths(model) if isinstance(model, LayerSkipModel) else _TransformersDepths(model)


class _TransformersDepths:
    def __init__(self, model: Any) -> None:
        self._model = model

    def states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """See `Depths`; transformers itself norms the last states only."""
        body, last = self._model.base_model, self._model.config.num_hidden_layers
        inner = any(depth != last for depth in depths)
        out = body(input_ids=input_ids, output_hidden_states=inner)
        return {d: out.last_hidden_state if d == last else body.norm(out.hidden_states[d]) for d in depths}

    def logits(self, rows: Tensor) -> Tensor:
        """See `Depths`."""
        logits: Tensor = self._model.get_output_embeddings()(rows)
        return logits / getattr(self._model.config, "logits_scaling", 1.0)  # Granite's, outside its head


class DecoderDepths:
    """Of a `LayerSkipModel`, as it reads prompts."""

    def __init__(self, model: LayerSkipModel) -> None:
        self._model = model

    @cached_property
    def _head(self) -> Tensor:
        """The head for torch's matmul."""
        return plain(self._model.head.head_weight, self._model.decoder.hidden_size, self._model.dtype)

    def raw_states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """The states [B, S, D] after so many layers, not normed."""
        decoder = self._model.decoder
        cache = decoder.new_cache(*input_ids.shape)
        state, found, start = self._model.embed(input_ids), {}, 0
        for depth in sorted(set(depths)):
            state = decoder.prefill(state, cache, start, depth)
            found[depth], start = state, depth
        return found

    def states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """See `Depths`."""
        head = self._model.head
        raw = self.raw_states(input_ids, depths)
        return {depth: rms_norm(state, head.norm_weight, head.eps) for depth, state in raw.items()}

    def logits(self, rows: Tensor) -> Tensor:
        """See `Depths`."""
        return F.linear(rows, self._head)
