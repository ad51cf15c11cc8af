"""The arg-max of the drafts over a vocabulary that is spread over ranks, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from .. import DraftHead, EarlyExitHead


def make_head(target: Any, draft_head: str) -> VocabularyShard | None:
    """What ``draft_head`` of `Settings` names; None where vLLM computes the drafts' logits itself."""
    if draft_head == "vllm":
        return None
    lm_head = target.lm_head
    if not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        raise NotImplementedError(
            f"the head is quantised ({type(lm_head.quant_method).__name__}), which vLLM alone reads: "
            """give --model-loader-extra-config '{"draft_head": "vllm"}'"""
        )
    return VocabularyShard(target, draft_head)


class VocabularyShard(nn.Module):
    """This rank's part of the head; its best token competes with those of the other ranks.

    Parameters
    ----------
    target : nn.Module
    draft_head : str
        ``full``, ``int8``, or where a saved draft head is.
    """

    def __init__(self, target: Any, draft_head: str) -> None:
        super().__init__()
        lm_head, norm = target.lm_head, target.model.norm
        shard = lm_head.shard_indices
        self._ranks: int = lm_head.tp_size
        self._first: int = shard.org_vocab_start_index
        # vLLM pads the vocabulary; the logit 0 of a padded row would beat those of a row with negative ones only.
        rows = lm_head.weight.detach()[: shard.num_org_elements]
        self._head: EarlyExitHead | None = EarlyExitHead(norm.weight.detach(), rows, norm.variance_epsilon)
        if draft_head == "int8":
            self._head = self._head.quantize()
        elif draft_head != "full":
            self._head = self._reduced(self._head, draft_head, target.config.vocab_size)

    def _reduced(self, head: EarlyExitHead, path: str, vocabulary: int) -> EarlyExitHead | None:
        chosen = DraftHead.load(path)
        if chosen.vocab_size != vocabulary:
            raise ValueError(f"{path} is for a vocabulary of {chosen.vocab_size}, the model has {vocabulary}")
        mine = chosen.token_ids - self._first
        mine = mine[(mine >= 0) & (mine < head.num_rows)]
        return head.quantize(mine.to(head.head_weight.device)) if mine.numel() else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens [R] of the raw states [R, D] after the exit layer."""
        if self._head is None:
            logit = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=torch.float32)
            token = torch.zeros_like(logit, dtype=torch.int64)
        else:
            token, logit, _ = self._head(hidden)
            token = token.clamp_min(0)  # a state that is not finite has no token, and any draft will do
        if self._ranks == 1:
            return token
        # In one fp32 tensor, which holds token ids below 2²⁴ exactly; vLLM gathers no doubles on CPUs.
        best = torch.stack([logit, (token + self._first).float()], -1)  # [R, 2]
        best = tensor_model_parallel_all_gather(best, dim=-1).view(-1, self._ranks, 2)
        winner = best[..., 0].argmax(-1, keepdim=True)
        return best[..., 1].gather(-1, winner).squeeze(-1).long()
