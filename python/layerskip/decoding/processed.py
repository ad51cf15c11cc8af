"""A round that chooses from processed logits: the same algorithm as in `round`, one op at a time.

Whatever distribution the drafts are drawn from, `accept_sampled` makes the result the target's, provided that it is
given both. So the processors go over the target's logits, because that is what was asked for, and over the draft's,
because drafts that the target can't emit are of no use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerskip_kernels import accept_sampled

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .history import History
from .processors import Processors
from .round import NOT_DRAFTED
from .rows import Rows

# What replaces a rejected draft must not be drawn with the noise that the draft was drawn with.
_DRAFT_SEED = 0x5851F42D4C957F2D


class ProcessedRound:
    """The rounds of some sequences, which keep their order.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    processors : Processors
    histories : sequence of History
        Up to and including the sequences' last tokens; empty where ``processors`` do not look back.
    """

    def __init__(
        self, model: LayerSkipModel, cache: SharedKVCache, processors: Processors, histories: Sequence[History]
    ) -> None:
        self._model, self._cache = model, cache
        self._processors, self._histories = processors, histories

    @property
    def failures(self) -> dict[int, Exception]:
        """What the sequences' own processors raised, by their index."""
        return self._processors.failures

    def first(self, state: Tensor, rows: Rows) -> Tensor:
        """The tokens [B] after ``state`` [B, D], the last of each prompt; ``rows.seq_lens`` is its position."""
        return self._choose(self._process(self._logits(state), 0), rows.seed, rows.seq_lens)

    def advance(self, rows: Rows, depth: int) -> Tensor:
        """As `round.advance`."""
        state = self._forward(rows.token, rows, 0, depth)
        token = self._choose(self._process(self._logits(state), 0), rows.seed, rows.seq_lens)
        rows.token.copy_(token)
        rows.seq_lens.add_(1)
        return torch.stack([torch.zeros_like(token), token], 1)

    def speculate(
        self, rows: Rows, exit_layer: int, steps: int, draft_head: EarlyExitHead, min_probability: float
    ) -> Tensor:
        """As `round.speculate`."""
        drafts, states, draft_logits = self._draft(rows, exit_layer, steps, draft_head, min_probability)
        hidden = self._model.decoder.forward(
            states, self._cache, exit_layer, self._model.num_layers, rows.seq_lens, rows.slots
        )
        target_logits = self._logits(hidden)
        for step in range(hidden.shape[1]):
            target_logits[:, step] = self._process(target_logits[:, step], step)
        accepted, token = accept_sampled(
            drafts, draft_logits, target_logits, rows.seq_lens, self._processors.temperature, rows.seed
        )
        rows.token.copy_(token)
        return torch.cat([accepted[:, None], token[:, None], drafts], 1)

    def _draft(
        self, rows: Rows, exit_layer: int, steps: int, head: EarlyExitHead, min_probability: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Drafts [B, K], states after layer E [B, K + 1, D], processed logits [B, K, V]; K is at most ``steps``."""
        model, token = self._model, rows.token
        batch, device = token.shape[0], token.device
        drafts = token.new_empty(batch, steps)
        states = torch.empty(batch, steps + 1, model.decoder.hidden_size, dtype=model.dtype, device=device)
        logits = torch.empty(batch, steps, model.vocab_size, dtype=torch.float32, device=device)
        states[:, 0] = self._forward(token, rows, 0, exit_layer)
        goes_on, made = torch.ones_like(token, dtype=torch.bool), 0
        while made < steps and (made == 0 or token.is_cuda or bool(goes_on.any())):  # on a GPU a look would be a sync
            logits[:, made] = self._process(self._logits(states[:, made], head), made)
            token = self._choose(logits[:, made], rows.seed ^ _DRAFT_SEED, rows.seq_lens + made)
            goes_on &= logits[:, made].ne(-math.inf).any(-1)  # a reduced head may score no token that is allowed
            token = torch.where(goes_on, token, NOT_DRAFTED)
            if min_probability:
                token, goes_on = self._limit(token, logits[:, made], goes_on, min_probability)
            for row, history in enumerate(self._histories):
                history.put_draft(made, token[row])
            drafts[:, made] = token
            made += 1
            states[:, made] = self._forward(token.clamp_min(0), rows, made, exit_layer)
        return drafts[:, :made], states[:, : made + 1], logits[:, :made]

    def _limit(self, token: Tensor, logits: Tensor, goes_on: Tensor, min_probability: float) -> tuple[Tensor, Tensor]:
        """The draft [B], where it is made, and which drafts go on after it.

        A greedy draft ends before an improbable token. One that was drawn stays, and the draft ends after it: to drop
        what was drawn because of what it is would change the distribution of the result.
        """
        probability = logits.softmax(-1).gather(1, token.clamp_min(0)[:, None])[:, 0]
        sure = probability >= min_probability
        stays = goes_on & (sure | (self._processors.temperature > 0) | (token < 0))
        return torch.where(stays, token, NOT_DRAFTED), goes_on & sure

    def _forward(self, token: Tensor, rows: Rows, step: int, depth: int) -> Tensor:
        """The state [B, D] after layers [0, depth) of tokens ``step`` positions after the rows' last ones."""
        hidden = self._model.embed(token[:, None])
        return self._model.decoder.forward(hidden, self._cache, 0, depth, rows.seq_lens + step, rows.slots)[:, 0]

    def _logits(self, hidden: Tensor, head: EarlyExitHead | None = None) -> Tensor:
        """Raw logits [..., V] of states [..., D]; -inf for tokens that a reduced draft head leaves out."""
        head = self._model.head if head is None else head
        rows = hidden.shape[:-1]
        logits = torch.empty(rows.numel(), head.num_rows, dtype=torch.float32, device=hidden.device)
        head(hidden, logits=logits)
        if head.token_map is not None:
            whole = logits.new_full((rows.numel(), self._model.vocab_size), -math.inf)
            logits = whole.index_copy_(1, head.token_map, logits)
        return logits.view(*rows, -1)

    def _process(self, logits: Tensor, drafts: int) -> Tensor:
        """Processed logits [B, V] of the position after so many drafts."""
        return self._processors(logits, [history.before(drafts) for history in self._histories])

    def _choose(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        """A token [B] of processed logits [B, V]: where nothing is drafted, acceptance only draws."""
        batch, vocabulary = logits.shape
        nothing = position.new_empty(batch, 0)
        temperature = self._processors.temperature
        return accept_sampled(
            nothing, logits.new_empty(batch, 0, vocabulary), logits[:, None], position.clone(), temperature, seed
        ).next_token
