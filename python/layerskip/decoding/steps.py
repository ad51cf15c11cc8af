"""The steps of decoding: read the prompt, then one token at a time, or one round of draft, verify, accept at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerskip_kernels import accept_greedy

from ..models import LayerSkipModel
from ..modules import EarlyExitHead, SharedKVCache

PREFILL_CHUNK = 512


class Progress(NamedTuple):
    """What one step gave.

    ``next_token`` [B] is the last token, on the device, for the next step; on the host are the accepted ``drafts``, the
    ``token`` that follows them, how many were ``drafted``, and the ``fault`` that keeps ``token`` from being emitted.
    """

    next_token: Tensor
    drafts: list[int]
    token: int
    drafted: int
    fault: str | None


def fault_of(token: int, what: str, layer: int, position: int) -> str | None:
    """A head says -1 where its logits are not finite: that is an error, never a token."""
    if token >= 0:
        return None
    return (
        f"{what} after layer {layer} gave logits that are not finite at position {position}; "
        "the weights or the states hold NaN or infinity"
    )


def prefill(model: LayerSkipModel, cache: SharedKVCache, prompt: Tensor, depth: int) -> tuple[Tensor, int]:
    """Run ``prompt`` [B, N] through layers [0, depth) into the cache; the token after it, on the device and the host.

    Only the last position gets logits, once.
    """
    for chunk in prompt.split(PREFILL_CHUNK, dim=1):
        hidden = model.decoder.prefill(model.embed(chunk), cache, 0, depth)
        cache.seq_lens.add_(chunk.shape[1])
    token = model.head(hidden[:, -1]).token  # [B]
    first = int(token)
    fault = fault_of(first, "the head", depth, prompt.shape[1] - 1)
    if fault is not None:
        raise FloatingPointError(fault)
    return token, first


class SingleSteps:
    """One token at a time, through layers [0, depth): the whole model, or an early exit without verification."""

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache, depth: int) -> None:
        self._model, self._cache, self._depth = model, cache, depth

    def step(self, token: Tensor, remaining: int, position: int) -> Progress:
        """Put ``token`` [B] at ``position`` and give the one after it."""
        draft = self._model.draft(token, self._cache, self._depth, self._model.head, steps=1, extend=False)
        next_token = draft.tokens[:, 0]  # [B]
        self._cache.seq_lens.add_(1)
        token_id = int(next_token)
        return Progress(next_token, [], token_id, 0, fault_of(token_id, "the head", self._depth, position))


class SpeculativeRounds:
    """Draft with layers [0, E), verify with layers [E, L) (Elhoushi et al. 2024, section 4.3).

    Drafting and verification share the weights, the cache, and the states after layer E: what a draft computed is not
    computed again.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    exit_layer : int
        E.
    num_speculations : int
        K, the most tokens that a round drafts.
    draft_head : EarlyExitHead
        May be approximate: verification repairs it.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        exit_layer: int,
        num_speculations: int,
        draft_head: EarlyExitHead,
    ) -> None:
        self._model, self._cache, self._exit_layer = model, cache, exit_layer
        self._num_speculations, self._draft_head = num_speculations, draft_head

    def step(self, token: Tensor, remaining: int, position: int) -> Progress:
        """One round from ``token`` [B], which goes to ``position``, where at most ``remaining`` tokens may follow.

        A round emits its drafts and one token more, so it drafts at most ``remaining - 1``; with that, its rows stay
        inside a cache that has room for the sequence.
        """
        count = min(self._num_speculations, remaining - 1)
        draft = self._model.draft(token, self._cache, self._exit_layer, self._draft_head, count)
        target = self._verify(draft.states)
        accepted, next_token = accept_greedy(draft.tokens, target, self._cache.seq_lens)
        return self._read(draft.tokens, accepted, next_token, position)

    def _verify(self, states: Tensor) -> Tensor:
        """The full model's choice after each of the rows, [B, K + 1], from their states after layer E."""
        hidden = self._model.decoder.forward(states, self._cache, self._exit_layer, self._model.num_layers)
        return self._model.head(hidden).token

    def _read(self, drafted: Tensor, accepted: Tensor, next_token: Tensor, position: int) -> Progress:
        """Bring the round to the host: its one synchronisation."""
        row = torch.cat([accepted[:, None], next_token[:, None], drafted], 1)[0].tolist()
        taken, token, drafts = row[0], row[1], row[2:]
        last = position + taken
        fault = fault_of(token, "the head", self._model.num_layers, last)
        # The draft after the accepted ones came from the right context, the ones after it did not.
        for draft in drafts[taken : taken + 1]:
            fault = fault or fault_of(draft, "the draft head", self._exit_layer, last)
        return Progress(next_token, drafts[:taken], token, len(drafts), fault)
