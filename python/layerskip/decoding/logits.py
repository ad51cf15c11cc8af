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
from layerskip_kernels.composition import draft_loop

from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .controls import LogitsControls
from .round import NOT_DRAFTED, Drafted, SequenceTensors, looked_up_states
from .sequence import History

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""(history [n] int64: prompt, emitted tokens and the drafts before this position; logits [V] fp32) -> logits [V]."""

# The token that replaces a rejected draft must not be drawn with the noise that the draft was drawn with.
_DRAFT_SEED = 0x5851F42D4C957F2D


class LogitsPipeline:
    """Bias, repetition penalty, a caller's own processor, temperature, top-k, top-p, min-p, in transformers' order.

    Parameters
    ----------
    own : sequence of LogitsProcessor or None
        One for each sequence.

    Attributes
    ----------
    failures : dict of int to Exception
        What a sequence's own processor raised; from then on it is not called.
    """

    def __init__(self, own: Sequence[LogitsProcessor | None]) -> None:
        self._own = own
        self.failures: dict[int, Exception] = {}

    def __call__(self, logits: Tensor, controls: LogitsControls, histories: Sequence[Tensor | None]) -> Tensor:
        """Process the logits of one position of each sequence.

        Parameters
        ----------
        logits : Tensor [B, V], fp32
        controls : LogitsControls
            Which have seen the tokens before this position.
        histories : sequence of Tensor [n], int64, or None
            These tokens, of each sequence that has a processor of its own.

        Returns
        -------
        Tensor [B, V], fp32
            -inf for a token that must not be chosen.
        """
        return controls.cut(self._apply_own(controls.penalized(logits), histories))

    def _apply_own(self, logits: Tensor, histories: Sequence[Tensor | None]) -> Tensor:
        if all(own is None for own in self._own):
            return logits
        rows = list(logits)
        for index, (own, history) in enumerate(zip(self._own, histories, strict=True)):
            if own is not None and history is not None and index not in self.failures:
                try:
                    rows[index] = _checked(own(history, rows[index].clone()), rows[index])
                except Exception as error:  # of one sequence: the others go on, and the session reports it
                    self.failures[index] = error
        return torch.stack(rows)


def _checked(processed: object, like: Tensor) -> Tensor:
    if not isinstance(processed, Tensor) or processed.shape != like.shape:
        shape = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
        raise ValueError(f"a logits processor must give a tensor {list(like.shape)}, got {shape}")
    return processed.to(like)


class LogitsRound:
    """The rounds of some sequences, which keep their order and have controls; the methods are those of `FusedRound`.

    Without processors of the sequences' own, a round looks at no value on the host but to draft no further than any
    sequence goes, and it does not where ``looks`` is False.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    pipeline : LogitsPipeline
    histories : sequence of History or None
        Of each sequence with a processor of its own, up to and including its last token.
    looks : bool
        On a card a look would be a synchronisation, and in a recorded round an error.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        pipeline: LogitsPipeline,
        histories: Sequence[History | None],
        looks: bool,
    ) -> None:
        self._model, self._cache = model, cache
        self._pipeline, self._histories, self._looks = pipeline, histories, looks

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index."""
        return self._pipeline.failures

    def first(self, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """As `FusedRound.first`."""
        controls = _controls_of(sequences)
        scores = self._process(self._logits(hidden), controls, 0)
        return self._choose(scores, controls, sequences.seed, sequences.seq_lens)

    def advance(self, sequences: SequenceTensors, exit_layer: int) -> Tensor:
        """As `FusedRound.advance`."""
        hidden = self._forward(sequences.token, sequences, 0, exit_layer)
        token = self.first(hidden, sequences)
        _controls_of(sequences).see(token[:, None])
        sequences.go_on(token)
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
            self._put_drafts(index, drafted.tokens[:, index])
        return drafted

    def accept(self, drafted: Drafted, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """As `FusedRound.accept`."""
        assert drafted.logits is not None
        drafts, target_logits, controls = drafted.tokens, self._logits(hidden), _controls_of(sequences)
        with_drafts = controls.apart()
        for index in range(hidden.shape[1]):
            target_logits[:, index] = self._process(target_logits[:, index], with_drafts, index)
            with_drafts.see(drafts[:, index : index + 1])
        accepted, token = accept_sampled(
            drafts, drafted.logits, target_logits, sequences.seq_lens, controls.draws, sequences.seed, drafted.token_map
        )
        held = torch.arange(drafts.shape[1], device=drafts.device) < accepted[:, None]
        controls.see(torch.cat([torch.where(held, drafts, token[:, None]), token[:, None]], 1))
        sequences.go_on(token)
        return torch.column_stack([accepted, token, drafts])

    def draft(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Drafted:
        """As `FusedRound.draft`, with processed logits over the vocabulary.

        K is ``num_speculations``, or fewer where no sequence has a use for more drafts.
        """
        model, token, controls = self._model, sequences.token, _controls_of(sequences).apart()
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
            if index and self._looks and not bool(goes_on.any()):
                return None
            scores = logits[:, index] = self._process(self._logits(hidden, model.draft_head), controls, index)
            token = self._choose(scores, controls, sequences.seed ^ _DRAFT_SEED, sequences.seq_lens + index)
            goes_on = goes_on & scores.ne(-math.inf).any(-1)  # a reduced head may score no token that is allowed
            token = torch.where(goes_on, token, NOT_DRAFTED)
            if draft_threshold:
                token, goes_on = self._apply_threshold(token, scores, goes_on, draft_threshold, controls.draws)
            controls.see(token[:, None])
            self._put_drafts(index, token)
            drafts[:, index] = token
            return token

        made = draft_loop(token, num_speculations, True, forward, choose)
        return Drafted(drafts[:, :made], states[:, : made + 1], logits[:, :made], None)

    def _put_drafts(self, index: int, tokens: Tensor) -> None:
        for number, history in enumerate(self._histories):
            if history is not None:
                history.put_draft(index, tokens[number])

    @staticmethod
    def _apply_threshold(
        token: Tensor, logits: Tensor, goes_on: Tensor, draft_threshold: float, draws: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The drafts [B], and whether drafting goes on after them.

        A greedy sequence stops drafting before an improbable token. One that draws stops after it: to drop a token that
        was drawn, because it is improbable, would change the distribution of the result.
        """
        probability = logits.softmax(-1).gather(1, token.clamp_min(0)[:, None])[:, 0]
        probable = probability >= draft_threshold
        stays = goes_on & (probable | (draws > 0) | (token < 0))
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

    def _process(self, logits: Tensor, controls: LogitsControls, num_drafts: int) -> Tensor:
        """Processed logits [B, V] of the position that follows so many drafts."""
        histories = [None if history is None else history.before(num_drafts) for history in self._histories]
        return self._pipeline(logits, controls, histories)

    @staticmethod
    def _choose(logits: Tensor, controls: LogitsControls, seed: Tensor, position: Tensor) -> Tensor:
        """Tokens [B] of processed logits [B, V]: acceptance of no drafts only draws the next token."""
        batch, vocabulary = logits.shape
        no_drafts, no_logits = position.new_empty(batch, 0), logits.new_empty(batch, 0, vocabulary)
        return accept_sampled(no_drafts, no_logits, logits[:, None], position.clone(), controls.draws, seed).next_token


def _controls_of(sequences: SequenceTensors) -> LogitsControls:
    assert sequences.controls is not None
    return sequences.controls
