"""The last row of each request in a drafter's first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

_ROWS_A_REQUEST = 16
"""Building metadata costs as much as about this many rows a request; a round of decoding has fewer."""


class LastRows:
    """Select one row a request: the token that the target has not seen.

    vLLM passes a drafter all tokens that the target has just run. The target's cache has the keys and values of all but
    the last already, so one row of a prompt is enough. ``names`` are those of the attention layers that run.
    """

    def __init__(self, vllm_config: VllmConfig, names: Sequence[str]) -> None:
        self._vllm_config, self._names = vllm_config, list(names)
        self._builder: Any = None

    def worth_it(self, metadata: Any) -> bool:
        """Whether skipping rows saves more than building metadata costs."""
        return metadata.num_actual_tokens > _ROWS_A_REQUEST * (metadata.query_start_loc.shape[0] - 1)

    def of(self, metadata: Any, slots: Tensor, positions: Tensor) -> tuple[Tensor, Any, Tensor]:
        """Rows [B], their metadata and slots [B].

        ``slots`` [≥ R] are where keys and values go, negative for rejected tokens, which follow the valid ones.
        """
        starts = metadata.query_start_loc
        requests, total = starts.shape[0] - 1, int(metadata.num_actual_tokens)
        index = torch.arange(total, device=slots.device)
        owner = torch.repeat_interleave(torch.arange(requests, device=slots.device), starts.diff().long())
        index = torch.where(slots[:total] < 0, -1, index)
        rows = index.new_full((requests,), -1).scatter_reduce(0, owner, index, "amax")
        slots = slots[rows].contiguous()
        seq_lens = (positions[rows] + 1).to(metadata.seq_lens.dtype)
        common = CommonAttentionMetadata(
            query_start_loc=torch.arange(requests + 1, dtype=starts.dtype, device=starts.device),
            query_start_loc_cpu=torch.arange(requests + 1, dtype=torch.int32),
            seq_lens=seq_lens,
            num_reqs=requests,
            num_actual_tokens=requests,
            max_query_len=1,
            max_seq_len=metadata.max_seq_len,
            block_table_tensor=metadata.block_table,
            slot_mapping=slots,
            causal=True,
            seq_lens_cpu_upper_bound=seq_lens.cpu(),
        )
        return rows, self._attention_builder(slots.device).build(0, common), slots

    def _attention_builder(self, device: torch.device) -> Any:
        if self._builder is None:  # the layers' cache is known only after loading
            attention = self._vllm_config.compilation_config.static_forward_context[self._names[0]]
            make = attention.get_attn_backend().get_builder_cls()
            self._builder = make(attention.get_kv_cache_spec(self._vllm_config), self._names, self._vllm_config, device)
        return self._builder
