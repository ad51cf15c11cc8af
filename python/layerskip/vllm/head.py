"""Arg-max of the drafts over a vocabulary that is sharded over ranks, without logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from .. import DraftHead, EarlyExitHead, Exit
from ..models.exit import head_of


def make_head(target: Any, norm: nn.Module, draft_head: str, exit: Exit | None) -> VocabularyShard | None:
    """The head that ``draft_head`` of `Settings` names; None if vLLM computes the drafts' logits."""
    if draft_head == "vllm":
        return None
    lm_head = target.lm_head
    if not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
        raise NotImplementedError(
            f"the head is quantised ({type(lm_head.quant_method).__name__}), which vLLM alone reads: "
            """give --model-loader-extra-config '{"draft_head": "vllm"}'"""
        )
    return VocabularyShard(target, norm, draft_head, exit)


class VocabularyShard(nn.Module):
    """This rank's part of the head after ``norm``; its best token competes with those of the other ranks.

    ``draft_head`` is ``full``, ``int8``, ``exit``, or the path of a saved draft head.
    """

    def __init__(self, target: Any, norm: Any, draft_head: str, exit: Exit | None) -> None:
        super().__init__()
        lm_head = target.lm_head
        shard = lm_head.shard_indices
        self._ranks: int = lm_head.tp_size
        self._first: int = shard.org_vocab_start_index
        # vLLM pads the vocabulary; the logit 0 of a padded row would beat those of a row with negative ones only.
        rows = lm_head.weight.detach()[: shard.num_org_elements]
        whole = EarlyExitHead(norm.weight.detach(), rows, norm.variance_epsilon)
        low_rank = None
        if exit is not None and exit.head_down is not None and exit.head_up is not None:
            mine = exit.head_up[self._first : self._first + whole.num_rows]
            low_rank = exit.head_down.to(rows.device), mine.to(rows.device)
        scored = self._scored(_chosen(draft_head, exit, target.config.vocab_size), whole)
        self._head = None if scored is None else head_of(whole, whole.norm_weight, low_rank, scored)

    def _scored(self, chosen: str | Tensor, whole: EarlyExitHead) -> str | Tensor | None:
        """The rows of the chosen tokens that this rank has; None if it has none."""
        if isinstance(chosen, str):
            return chosen
        mine = chosen - self._first
        mine = mine[(mine >= 0) & (mine < whole.num_rows)]
        return mine.to(whole.head_weight.device) if mine.numel() else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens [R] of the raw states [R, D] after the exit layer."""
        if self._head is None:
            logit = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=torch.float32)
            token = torch.zeros_like(logit, dtype=torch.int64)
        else:
            token, logit, _ = self._head(hidden)
            token = token.clamp_min(0)  # a state that is not finite has no token; any draft will do
        if self._ranks == 1:
            return token
        # In one fp32 tensor, which holds token ids below 2²⁴ exactly; vLLM gathers no doubles on CPUs.
        best = torch.stack([logit, (token + self._first).float()], -1)  # [R, 2]
        best = tensor_model_parallel_all_gather(best, dim=-1).view(-1, self._ranks, 2)
        winner = best[..., 0].argmax(-1, keepdim=True)
        return best[..., 1].gather(-1, winner).squeeze(-1).long()


def _chosen(draft_head: str, exit: Exit | None, vocabulary: int) -> str | Tensor:
    """``full``, ``int8``, or token ids."""
    if draft_head in ("full", "int8"):
        return draft_head
    if exit is not None and draft_head == "exit":
        return "full" if exit.token_ids is None else exit.token_ids
    saved = DraftHead.load(draft_head)
    if saved.vocab_size != vocabulary:
        raise ValueError(f"{draft_head} is for a vocabulary of {saved.vocab_size}, the model has {vocabulary}")
    return saved.token_ids
