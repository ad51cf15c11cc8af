"""Rounds that choose tokens from processed logits: the algorithm of `FusedRound`, one op at a time.

The processors change the target's logits, because the user asks for that, and the draft's, because a draft that the
target cannot emit is useless. `accept_sampled` is given both, so the result has the target's distribution, whatever
distribution the drafts are drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerskip_kernels import accept_sampled
from layerskip_kernels.rounds import draft_loop

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .round import NOT_DRAFTED, Drafted, SequenceTensors, looked_up_states
from .sampling import SamplingParams
from .sequence import History

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""(history [n] int64: prompt, emitted tokens and the drafts before this position; logits [V] fp32) -> logits [V]."""

# The token that replaces a rejected draft must not be drawn with the noise that the draft was drawn with.
_DRAFT_SEED = 0x5851F42D4C957F2D


class LogitsPipeline:
    """Bias, repetition penalty, a caller's own processor, temperature, top-k, top-p, min-p, in transformers' order.

    Parameters
    ----------
    params : sequence of SamplingParams
        One for each sequence.
    own : sequence of LogitsProcessor or None
        One for each sequence.
    vocab_size : int
    device : torch.device

    Attributes
    ----------
    temperature : Tensor [B], fp32
        1 where a token is to be drawn from the processed logits, 0 where the largest is to be taken.
    failures : dict of int to Exception
        What a sequence's own processor raised; from then on it is not called.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        own: Sequence[LogitsProcessor | None],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._own = own
        self.failures: dict[int, Exception] = {}
        self._bias = _bias(params, vocab_size, device)
        self._penalty = column([one.repetition_penalty for one in params])
        self._penalizes = any(one.repetition_penalty != 1 for one in params)
        # The cuts spare greedy sequences: the largest logit survives every cut.
        self._temperature = column([one.temperature or 1.0 for one in params])
        top_k = [vocab_size if one.greedy else min(one.top_k or vocab_size, vocab_size) for one in params]
        self._top_k = None if min(top_k) == vocab_size else torch.tensor(top_k, device=device)[:, None]
        self._largest_k = max((k for k in top_k if k < vocab_size), default=0)
        self._top_p = _column_or_none([1.0 if one.greedy else one.top_p for one in params], 1.0, column)
        self._min_p = _column_or_none([0.0 if one.greedy else one.min_p for one in params], 0.0, column)
        self.temperature = column([0.0 if one.greedy else 1.0 for one in params])[:, 0]

    @property
    def needs_history(self) -> bool:
        """Whether the result depends on the tokens before."""
        return self._penalizes or any(own is not None for own in self._own)

    def __call__(self, logits: Tensor, histories: Sequence[Tensor]) -> Tensor:
        """Process the logits of one position of each sequence.

        Parameters
        ----------
        logits : Tensor [B, V], fp32
        histories : sequence of Tensor [n], int64
            The tokens before this position, of each sequence.

        Returns
        -------
        Tensor [B, V], fp32
            -inf for a token that must not be chosen.
        """
        if self._bias is not None:
            logits = logits + self._bias
        if self._penalizes:
            logits = self._penalize(logits, histories)
        logits = self._apply_own(logits, histories) / self._temperature
        if self._top_k is not None:
            logits = _keep_top_k(logits, self._top_k, self._largest_k)
        if self._top_p is not None:
            logits = _keep_top_p(logits, self._top_p)
        if self._min_p is not None:
            floor = logits.amax(-1, keepdim=True) + self._min_p.log()
            logits = logits.masked_fill(logits < floor, -math.inf)
        return logits

    def _penalize(self, logits: Tensor, histories: Sequence[Tensor]) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, history in zip(seen, histories, strict=True):
            row[history] = True
        penalised = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
        return torch.where(seen, penalised, logits)

    def _apply_own(self, logits: Tensor, histories: Sequence[Tensor]) -> Tensor:
        if all(own is None for own in self._own):
            return logits
        rows = list(logits)
        for index, own in enumerate(self._own):
            if own is not None and index not in self.failures:
                try:
                    rows[index] = _checked(own(histories[index], rows[index].clone()), rows[index])
                except Exception as error:  # of one sequence: the others go on, and the session reports it
                    self.failures[index] = error
        return torch.stack(rows)


def _checked(processed: object, like: Tensor) -> Tensor:
    if not isinstance(processed, Tensor) or processed.shape != like.shape:
        shape = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
        raise ValueError(f"a logits processor must give a tensor {list(like.shape)}, got {shape}")
    return processed.to(like)


def _bias(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Tensor | None:
    if not any(one.logit_bias for one in params):
        return None
    bias = torch.zeros(len(params), vocab_size, dtype=torch.float32)
    for row, one in zip(bias, params, strict=True):
        if one.logit_bias:
            row[list(one.logit_bias)] = torch.tensor(list(one.logit_bias.values()), dtype=torch.float32)
    return bias.to(device)


def _column_or_none(values: list[float], neutral: float, column: Callable[[list[float]], Tensor]) -> Tensor | None:
    return None if all(value == neutral for value in values) else column(values)


def _keep_top_k(logits: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    """Drop what is smaller than the k-th largest; ``largest_k`` is the greatest k that drops anything."""
    ranked = logits.topk(largest_k, -1).values  # [B, largest_k]
    threshold = ranked.gather(1, (top_k - 1).clamp_max(largest_k - 1))
    return logits.masked_fill((logits < threshold) & (top_k <= largest_k), -math.inf)


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Drop the least probable tokens that together have at most 1 - p; never the most probable one."""
    ascending, order = logits.sort(-1)
    drop = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -math.inf)


class LogitsRound:
    """The rounds of some sequences, which keep their order; the methods are those of `FusedRound`.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    pipeline : LogitsPipeline
    histories : sequence of History
        One for each sequence, up to and including its last token; none where ``pipeline`` needs no history.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        pipeline: LogitsPipeline,
        histories: Sequence[History],
    ) -> None:
        self._model, self._cache = model, cache
        self._pipeline, self._histories = pipeline, histories

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index."""
        return self._pipeline.failures

    def first(self, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """As `FusedRound.first`."""
        return self._choose(self._process(self._logits(hidden), 0), sequences.seed, sequences.seq_lens)

    def advance(self, sequences: SequenceTensors, exit_layer: int) -> Tensor:
        """As `FusedRound.advance`."""
        hidden = self._forward(sequences.token, sequences, 0, exit_layer)
        token = self.first(hidden, sequences)
        sequences.token.copy_(token)
        sequences.seq_lens.add_(1)
        return torch.stack([torch.zeros_like(token), token], 1)

    def speculate(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Tensor:
        """As `FusedRound.speculate`."""
        drafted = self.draft(sequences, exit_layer, num_speculations, draft_threshold)
        hidden = self._model.decoder.forward(
            drafted.states, self._cache, exit_layer, self._model.num_layers, sequences.seq_lens, sequences.slots
        )
        return self.accept(drafted, hidden, sequences)

    def verify(self, sequences: SequenceTensors) -> Tensor:
        """As `FusedRound.verify`."""
        drafted = self.look_up(sequences)
        return self.accept(drafted, drafted.states, sequences)

    def look_up(self, sequences: SequenceTensors, end: int | None = None) -> Drafted:
        """As `FusedRound.look_up`."""
        drafted = looked_up_states(self._model, self._cache, sequences, end)
        for index in range(drafted.tokens.shape[1]):
            for number, history in enumerate(self._histories):
                history.put_draft(index, drafted.tokens[number, index])
        return drafted

    def accept(self, drafted: Drafted, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """As `FusedRound.accept`."""
        assert drafted.logits is not None
        target_logits = self._logits(hidden)
        for index in range(hidden.shape[1]):
            target_logits[:, index] = self._process(target_logits[:, index], index)
        accepted, token = accept_sampled(
            drafted.tokens, drafted.logits, target_logits, sequences.seq_lens, self._pipeline.temperature,
            sequences.seed, drafted.token_map,
        )  # fmt: skip
        sequences.token.copy_(token)
        return torch.cat([accepted[:, None], token[:, None], drafted.tokens], 1)

    def draft(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Drafted:
        """As `FusedRound.draft`, with processed logits over the vocabulary.

        K is ``num_speculations``, or fewer where no sequence has a use for more drafts.
        """
        model, token = self._model, sequences.token
        batch, device = token.shape[0], token.device
        drafts = token.new_empty(batch, num_speculations)
        states = torch.empty(batch, num_speculations + 1, model.decoder.hidden_size, dtype=model.dtype, device=device)
        logits = torch.empty(batch, num_speculations, model.vocab_size, dtype=torch.float32, device=device)
        goes_on = torch.ones_like(token, dtype=torch.bool)

        def forward(token: Tensor, index: int) -> Tensor:
            states[:, index] = self._forward(token.clamp_min(0), sequences, index, exit_layer)
            return self._blocks(states[:, index], sequences, index)

        def choose(hidden: Tensor, index: int) -> Tensor | None:
            nonlocal goes_on
            # On a GPU a look at goes_on would be a synchronisation, so there all drafts are made.
            if not (index == 0 or hidden.is_cuda or bool(goes_on.any())):
                return None
            scores = logits[:, index] = self._process(self._logits(hidden, model.draft_head), index)
            token = self._choose(scores, sequences.seed ^ _DRAFT_SEED, sequences.seq_lens + index)
            goes_on = goes_on & scores.ne(-math.inf).any(-1)  # a reduced head may score no token that is allowed
            token = torch.where(goes_on, token, NOT_DRAFTED)
            if draft_threshold:
                token, goes_on = self._apply_threshold(token, scores, goes_on, draft_threshold)
            for number, history in enumerate(self._histories):
                history.put_draft(index, token[number])
            drafts[:, index] = token
            return token

        made = draft_loop(token, num_speculations, True, forward, choose)
        return Drafted(drafts[:, :made], states[:, : made + 1], logits[:, :made], None)

    def _apply_threshold(
        self, token: Tensor, logits: Tensor, goes_on: Tensor, draft_threshold: float
    ) -> tuple[Tensor, Tensor]:
        """The drafts [B], and whether drafting goes on after them.

        A greedy sequence stops drafting before an improbable token. One that draws stops after it: to drop a token that
        was drawn, because it is improbable, would change the distribution of the result.
        """
        probability = logits.softmax(-1).gather(1, token.clamp_min(0)[:, None])[:, 0]
        probable = probability >= draft_threshold
        stays = goes_on & (probable | (self._pipeline.temperature > 0) | (token < 0))
        return torch.where(stays, token, NOT_DRAFTED), goes_on & probable

    def _forward(self, token: Tensor, sequences: SequenceTensors, offset: int, exit_layer: int) -> Tensor:
        """The states [B, D] after layers [0, exit_layer) of tokens [B], ``offset`` positions after the last ones."""
        hidden, lengths = self._model.embed(token[:, None]), sequences.seq_lens + offset
        return self._model.decoder.forward(hidden, self._cache, 0, exit_layer, lengths, sequences.slots)[:, 0]

    def _blocks(self, hidden: Tensor, sequences: SequenceTensors, offset: int) -> Tensor:
        """The states [B, D] after the exit's blocks."""
        decoder, lengths = self._model.decoder, sequences.seq_lens + offset
        if not decoder.num_blocks:
            return hidden
        layers = decoder.num_layers, decoder.num_layers + decoder.num_blocks
        return decoder.forward(hidden[:, None], self._cache, *layers, lengths, sequences.slots)[:, 0]

    def _logits(self, hidden: Tensor, head: EarlyExitHead | None = None) -> Tensor:
        """Raw logits [..., V] of states [..., D]; -inf for tokens that a reduced draft head leaves out."""
        head = self._model.head if head is None else head
        leading = hidden.shape[:-1]
        logits = torch.empty(leading.numel(), head.num_rows, dtype=torch.float32, device=hidden.device)
        head(hidden, logits=logits)
        if head.token_map is not None:
            whole = logits.new_full((leading.numel(), self._model.vocab_size), -math.inf)
            logits = whole.index_copy_(1, head.token_map, logits)
        return logits.view(*leading, -1)

    def _process(self, logits: Tensor, num_drafts: int) -> Tensor:
        """Processed logits [B, V] of the position that follows so many drafts."""
        return self._pipeline(logits, [history.before(num_drafts) for history in self._histories])

    def _choose(self, logits: Tensor, seed: Tensor, position: Tensor) -> Tensor:
        """Tokens [B] of processed logits [B, V]: acceptance of no drafts only draws the next token."""
        batch, vocabulary = logits.shape
        no_drafts, no_logits = position.new_empty(batch, 0), logits.new_empty(batch, 0, vocabulary)
        temperature = self._pipeline.temperature
        return accept_sampled(no_drafts, no_logits, logits[:, None], position.clone(), temperature, seed).next_token
