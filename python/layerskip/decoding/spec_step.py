"""One step of a batch on the device: prefill's first token, one token per sequence, or one speculative round.

Every step gives one tensor [B, 2 + K] int64, which is all that the host reads: the number of accepted draft tokens, the
token that follows them, the K draft tokens. A token is -1 where logits are not finite; a draft token is `NOT_DRAFTED`
where none was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import Noise, accept_greedy, accept_sampled
from layerskip_kernels.speculative import run_draft, run_round

from ..devices import to_device
from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .sampling import History, LogitsControls, LogitsProcessor

NOT_DRAFTED = -2
# The token that replaces a rejected draft must not be drawn with the noise that the draft was drawn with.
_DRAFT_SEED = 0x5851F42D4C957F2D


class DraftTensors(NamedTuple):
    """Draft tokens, from any source, as verification takes them.

    ``tokens`` [B, K] are `NOT_DRAFTED` from where a sequence has none. ``states`` [B, K + 1, D] are those of the last
    token and the draft tokens after the layer from which they are verified. Where tokens are drawn, draft tokens were
    drawn from ``logits`` [B, K, S] over the tokens ``token_map`` [S], or over the vocabulary.
    """

    tokens: Tensor
    states: Tensor
    logits: Tensor | None
    token_map: Tensor | None


class LookupDrafts(NamedTuple):
    """Draft tokens from earlier text or another source without an exit, ``tokens`` [B, K].

    Where tokens are drawn, ``token_map`` [S] holds each of them once.
    """

    tokens: Tensor
    token_map: Tensor | None

    @classmethod
    def of(
        cls, drafts: Sequence[Sequence[int]], num_speculations: int, vocab_size: int, device: torch.device, draws: bool
    ) -> LookupDrafts:
        """Copy draft tokens to the device, asynchronously; the tensors' sizes depend only on B and K."""
        padded = [[*draft, *[NOT_DRAFTED] * (num_speculations - len(draft))] for draft in drafts]
        tokens = to_device(torch.tensor(padded, dtype=torch.int64), device)
        if not draws:
            return cls(tokens, None)
        known = {token for draft in drafts for token in draft}
        size = min(max(1, len(drafts) * num_speculations), vocab_size)
        others = (token for token in range(vocab_size) if token not in known)
        return cls(tokens, to_device(torch.tensor([*known, *islice(others, size - len(known))]), device))

    @property
    def logits(self) -> Tensor:
        """[B, K, S]: the distribution in which each draft token is certain."""
        certain = (self.tokens[:, :, None] == self.token_map) | (self.tokens < 0)[:, :, None]
        return torch.where(certain, 0.0, -torch.inf)


@dataclass(frozen=True)
class SequenceTensors:
    """The state of the sequences of a round: entry b of every tensor belongs to sequence b.

    A round rewrites the first two tensors in place, and the tokens that the controls have seen.

    Attributes
    ----------
    token : Tensor [B], int64
        The last token of each sequence, which is not in the cache yet.
    seq_lens : Tensor [B], int64
        Its position, which is also how many positions the cache holds.
    slots : Tensor [B], int64
        The cache row of each sequence.
    seed : Tensor [B], int64
        Seed and position determine the noise that a token is drawn with.
    temperature : Tensor [B], fp32, or None
        None where every sequence is greedy.
    lookup : LookupDrafts or None
        Draft tokens of the next round that no exit makes.
    controls : LogitsControls or None
        How logits are processed, where they are.
    """

    token: Tensor
    seq_lens: Tensor
    slots: Tensor
    seed: Tensor
    temperature: Tensor | None = None
    lookup: LookupDrafts | None = None
    controls: LogitsControls | None = None

    @property
    def noise(self) -> Noise | None:
        """Temperature and seed as the kernels take them, or None where every sequence is greedy."""
        return None if self.temperature is None else Noise(self.temperature, self.seed)

    @property
    def draws(self) -> bool:
        """Whether tokens may be drawn, or chosen from processed logits as drawn ones are."""
        return self.temperature is not None or self.controls is not None

    @property
    def form(self) -> Hashable:
        """What a round depends on besides values."""
        controls = None if self.controls is None else self.controls.form
        return self.token.shape[0], self.temperature is not None, controls

    def clone(self) -> SequenceTensors:
        """The same values in new tensors."""
        lookup = self.lookup
        if lookup is not None:
            token_map = None if lookup.token_map is None else lookup.token_map.clone()
            lookup = LookupDrafts(lookup.tokens.clone(), token_map)
        return self._each(Tensor.clone, lookup)

    def rows(self, index: Tensor) -> SequenceTensors:
        """Some of the sequences, in new tensors."""
        lookup = self.lookup
        if lookup is not None:
            lookup = lookup._replace(tokens=lookup.tokens[index])
        return self._each(lambda tensor: tensor[index], lookup)

    def _each(self, change: Callable[[Tensor], Tensor], lookup: LookupDrafts | None) -> SequenceTensors:
        temperature = None if self.temperature is None else change(self.temperature)
        controls = None if self.controls is None else self.controls.each(change)
        token, seq_lens, slots, seed = map(change, (self.token, self.seq_lens, self.slots, self.seed))
        return SequenceTensors(token, seq_lens, slots, seed, temperature, lookup, controls)

    def set_last_token(self, token: Tensor) -> None:
        """Set the last tokens, and token 0 in the place of -1.

        A token is -1 where logits are not finite, which ends its sequence. The next round may begin before the host has
        read that, and the embedding has no row -1.
        """
        torch.clamp(token, min=0, out=self.token)

    def copy_(self, other: SequenceTensors) -> None:
        """Take the values of ``other``, which has the same form; nothing is done for a tensor that both share."""
        whole, others = [], []
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            if mine is theirs:
                continue
            if mine.dtype == torch.int64:
                whole.append(mine)
                others.append(theirs)
            else:
                mine.copy_(theirs)
        if whole:
            torch._foreach_copy_(whole, others)  # one launch

    def _tensors(self) -> list[Tensor]:
        temperature = () if self.temperature is None else (self.temperature,)
        controls = () if self.controls is None else self.controls.tensors
        lookup = [tensor for tensor in self.lookup or () if tensor is not None]
        return [self.token, self.seq_lens, self.slots, self.seed, *temperature, *lookup, *controls]

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        seq_lens: Sequence[int],
        slots: Sequence[int],
        seeds: Sequence[int],
        temperatures: Sequence[float],
        device: torch.device,
    ) -> SequenceTensors:
        """The tensors of values that the host knows."""
        token, lengths, cache_rows, seed = to_device(torch.tensor([tokens, seq_lens, slots, seeds]), device).unbind()
        drawn = any(temperatures)
        temperature = to_device(torch.tensor(temperatures, dtype=torch.float32), device) if drawn else None
        return cls(token, lengths, cache_rows, seed, temperature)


class LogitsPipeline:
    """Bias, repetition penalty, a caller's own processor, temperature, top-k, top-p, min-p, in transformers' order.

    Parameters
    ----------
    processors : sequence of LogitsProcessor or None
        The requests' own processors, one for each sequence.
    histories : sequence of History or None
        Of each sequence with a processor of its own, up to and including its last token.

    Attributes
    ----------
    failures : dict of int to Exception
        What a sequence's own processor raised, by sequence; from then on it is not called.
    """

    def __init__(
        self, processors: Sequence[LogitsProcessor | None] = (), histories: Sequence[History | None] = ()
    ) -> None:
        pairs = zip(processors, histories, strict=True)
        self._own = [
            (row, (own, past)) for row, (own, past) in enumerate(pairs) if own is not None and past is not None
        ]
        self.failures: dict[int, Exception] = {}

    def __call__(
        self, logits: Tensor, controls: LogitsControls, num_drafts: int, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Process the logits [B, V], fp32, of the position that follows ``num_drafts`` draft tokens.

        ``controls`` have seen the tokens before this position. ``rows`` are the sequences, by default all. A token that
        must not be chosen gets -inf.
        """
        logits = controls.penalized(logits)
        logits = logits.clone() if self._own else logits
        for sequence, (processor, history) in self._own:
            row = _place(sequence, rows)
            if row is None or sequence in self.failures:
                continue
            try:
                logits[row] = _checked(processor(history.before(num_drafts), logits[row].clone()), logits[row])
            except Exception as error:  # of one request: the session reports it, and the others continue
                self.failures[sequence] = error
        return controls.cut(logits)

    def put_drafts(self, index: int, tokens: Tensor, rows: Sequence[int] | None = None) -> None:
        """Add draft token ``index`` [B] of each sequence to its history."""
        for sequence, (_, history) in self._own:
            if (row := _place(sequence, rows)) is not None:
                history.put_draft(index, tokens[row])


def _checked(processed: object, like: Tensor) -> Tensor:
    if not isinstance(processed, Tensor) or processed.shape != like.shape:
        shape = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
        raise ValueError(f"a logits processor must give a tensor {list(like.shape)}, got {shape}")
    return processed.to(like)


def _place(sequence: int, rows: Sequence[int] | None) -> int | None:
    """Where a sequence is among ``rows``; None if it is not."""
    return sequence if rows is None else rows.index(sequence) if sequence in rows else None


class SpecStep:
    """The steps of a batch.

    `speculate` is the round: `layerskip_kernels.speculative.run_round` describes it. Without logits processing and with
    drafts of an exit alone, one fused call computes it. Otherwise it runs part by part here.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
        With room for K + 1 more positions of every sequence.
    pipeline : LogitsPipeline, optional
        Processes logits over the whole vocabulary; the sequences have `LogitsControls`. Without it no logits of greedy
        sequences are written.
    may_sync : bool
        Whether drafting may look at values on the host to stop early. A GPU would have to be synchronized, and a
        recorded step cannot.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        pipeline: LogitsPipeline | None = None,
        may_sync: bool = False,
    ) -> None:
        self._model, self._cache, self._pipeline, self._may_sync = model, cache, pipeline, may_sync

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index."""
        return {} if self._pipeline is None else self._pipeline.failures

    def first(self, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """The tokens [B] that follow the prompts, from the states [B, D] of the prompts' last tokens.

        ``sequences.seq_lens`` are the positions of these last tokens.
        """
        if self._pipeline is not None:
            controls = _controls_of(sequences)
            logits = self._pipeline(self._logits(hidden), controls, 0)
            return _choose(logits, controls, sequences.seed, sequences.seq_lens)
        if sequences.noise is None:
            return self._model.head(hidden).token
        return self._model.head(hidden, *sequences.noise, sequences.seq_lens).token

    def advance(self, sequences: SequenceTensors, num_layers: int) -> Tensor:
        """Decode one token with layers [0, num_layers): all layers, or an early exit without verification.

        Returns
        -------
        Tensor [B, 2], int64
        """
        places = {"seq_lens": sequences.seq_lens, "slots": sequences.slots}
        if self._pipeline is None:
            token = self._model.decode(sequences.token, self._cache, num_layers, noise=sequences.noise, **places)
        else:
            hidden = self._model.decoder.forward(
                self._model.embed(sequences.token[:, None]), self._cache, 0, num_layers, **places
            )
            token = self.first(hidden[:, 0], sequences)
            _controls_of(sequences).see(token[:, None])
        sequences.set_last_token(token)
        sequences.seq_lens.add_(1)
        return F.pad(token[:, None], (1, 0))

    def speculate(
        self,
        sequences: SequenceTensors,
        exit_layer: int | None,
        num_speculations: int,
        draft_threshold: float = 0.0,
        lookup_rows: Sequence[int] | None = None,
    ) -> Tensor:
        """One round of self-speculative decoding; the sequences are advanced to the last token that it gives.

        Parameters
        ----------
        sequences : SequenceTensors
            With ``lookup`` drafts, the sequences ``lookup_rows`` take these instead of drafting; by default all do.
        exit_layer, num_speculations : int
            E and K of the sequences that draft; E is None if there are none.
        draft_threshold : float
            A greedy draft ends before a token less probable than this; 0 where sequences draw.

        Returns
        -------
        Tensor [B, 2 + K], int64
            K is the larger of ``num_speculations`` and what was looked up.
        """
        model, lookup = self._model, sequences.lookup
        # Lookup drafts alone need no exit: one pass through all layers reads them.
        verify_from = exit_layer
        if verify_from is None or (lookup is not None and lookup_rows is None):
            verify_from = model.num_layers
        if lookup is None and self._pipeline is None:
            return self._fused(sequences, verify_from, num_speculations, draft_threshold)
        parts = [_Part(None, None, sequences)] if lookup_rows is None else _split(sequences, lookup_rows)

        def draft() -> tuple[list[DraftTensors], Tensor]:
            proposals = [
                self._draft(part, verify_from, num_speculations, draft_threshold)
                if part.sequences.lookup is None
                else self._look_up(part, verify_from)
                for part in parts
            ]
            return proposals, _join(parts, [proposal.states for proposal in proposals])

        def verify(states: Tensor) -> Tensor:
            if verify_from == model.num_layers:
                return states
            lengths, slots = sequences.seq_lens, sequences.slots
            return model.decoder.forward(states, self._cache, verify_from, model.num_layers, lengths, slots)

        def accept(proposals: list[DraftTensors], hidden: Tensor) -> Tensor:
            results = []
            for part, proposal in zip(parts, proposals, strict=True):
                own = hidden if part.index is None else hidden[part.index]
                results.append(self._accept(part, proposal, own[:, : proposal.states.shape[1]]))
                part.write_back(sequences)
            return _join(parts, results, NOT_DRAFTED)

        return run_round(draft, verify, accept)

    def _fused(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float
    ) -> Tensor:
        """`speculate` as one call, for drafts of an exit and without logits processing."""
        done = self._model.speculate(
            sequences.token,
            self._cache,
            exit_layer,
            num_speculations,
            draft_threshold=draft_threshold,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
        )
        sequences.set_last_token(done.next_token)
        drafts = _mark_not_drafted(done.tokens, done.probability, draft_threshold)
        return torch.column_stack([done.accepted, done.next_token, drafts])

    def _draft(self, part: _Part, exit_layer: int, num_speculations: int, draft_threshold: float) -> DraftTensors:
        """Draft with layers [0, E), the exit's draft layers and its head."""
        if self._pipeline is not None:
            return self._draft_from_logits(part, exit_layer, num_speculations, draft_threshold)
        sequences, head, logits = part.sequences, self._model.draft_head, None
        if sequences.noise is not None:
            size = (sequences.token.shape[0], num_speculations, head.num_rows)
            logits = torch.empty(size, dtype=torch.float32, device=sequences.token.device)
        made = self._model.draft(
            sequences.token,
            self._cache,
            exit_layer,
            num_speculations,
            draft_threshold=draft_threshold,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
            logits=logits,
        )
        tokens = _mark_not_drafted(made.tokens, made.probability, draft_threshold)
        return DraftTensors(tokens, made.states, logits, head.token_map)

    def _draft_from_logits(
        self, part: _Part, exit_layer: int, num_speculations: int, draft_threshold: float
    ) -> DraftTensors:
        """Draft from processed logits over the vocabulary: a draft token that the target cannot emit is useless.

        K is ``num_speculations``, or fewer where no sequence has a use for more draft tokens.
        """
        model, sequences, pipeline = self._model, part.sequences, self._pipeline
        assert pipeline is not None
        decoder, token, controls = model.decoder, sequences.token, _controls_of(sequences).apart()
        batch, device = token.shape[0], token.device
        drafts = token.new_empty(batch, num_speculations)
        states = torch.empty(batch, num_speculations + 1, decoder.hidden_size, dtype=model.dtype, device=device)
        logits = torch.empty(batch, num_speculations, model.vocab_size, dtype=torch.float32, device=device)
        drafting = torch.ones_like(token, dtype=torch.bool)

        def layers(hidden: Tensor, row: int, start: int, end: int) -> Tensor:
            lengths = sequences.seq_lens + row
            return decoder.forward(hidden[:, None], self._cache, start, end, lengths, sequences.slots)[:, 0]

        def draft_layers(state: Tensor, row: int) -> Tensor:
            first = decoder.num_layers
            return layers(state, row, first, first + decoder.num_draft_layers) if decoder.num_draft_layers else state

        def forward(token: Tensor, row: int) -> Tensor:
            states[:, row] = layers(model.embed(token.clamp_min(0)), row, 0, exit_layer)
            return draft_layers(states[:, row], row)

        def choose(hidden: Tensor, row: int) -> Tensor | None:
            nonlocal drafting
            if row and self._may_sync and not bool(drafting.any()):
                return None
            scores = logits[:, row] = pipeline(self._logits(hidden, model.draft_head), controls, row, part.rows)
            token = _choose(scores, controls, sequences.seed ^ _DRAFT_SEED, sequences.seq_lens + row)
            drafting = drafting & scores.ne(-math.inf).any(-1)  # a reduced head may score no token that is allowed
            token = torch.where(drafting, token, NOT_DRAFTED)
            if draft_threshold:
                token, drafting = _apply_threshold(token, scores, drafting, draft_threshold, controls.draws)
            controls.see(token[:, None])
            pipeline.put_drafts(row, token, part.rows)
            drafts[:, row] = token
            return token

        made = run_draft(token, num_speculations, True, forward, choose)
        return DraftTensors(drafts[:, :made], states[:, : made + 1], logits[:, :made], None)

    def _look_up(self, part: _Part, num_layers: int) -> DraftTensors:
        """Take the lookup drafts, and run layers [0, num_layers) on them in one pass."""
        sequences = part.sequences
        assert sequences.lookup is not None
        tokens, token_map = sequences.lookup
        rows = torch.column_stack([sequences.token, tokens]).clamp_min(0)  # a draft that is missing is any token
        states = self._model.read(rows, self._cache, num_layers, seq_lens=sequences.seq_lens, slots=sequences.slots)
        if self._pipeline is not None:
            for index in range(tokens.shape[1]):
                self._pipeline.put_drafts(index, tokens[:, index], part.rows)
        return DraftTensors(tokens, states, sequences.lookup.logits if sequences.draws else None, token_map)

    def _accept(self, part: _Part, proposal: DraftTensors, hidden: Tensor) -> Tensor:
        """Accept draft tokens by the states ``hidden`` [B, K + 1, D] after the last layer.

        A lookup draft is drawn from a distribution of one token. So where tokens are drawn, it is accepted with the
        probability p that the model gives it, and else a token is drawn from p without it (Leviathan et al. 2023).
        """
        sequences, model = part.sequences, self._model
        drafts, seq_lens = proposal.tokens, sequences.seq_lens
        if self._pipeline is not None:
            accepted, token = self._accept_from_logits(part, proposal, hidden)
        elif sequences.noise is None:
            target = model.head(hidden.flatten(0, 1)).token.view(hidden.shape[:2])
            accepted, token = accept_greedy(drafts, target, seq_lens)
        else:
            assert proposal.logits is not None
            logits = hidden.new_empty((*hidden.shape[:2], model.vocab_size), dtype=torch.float32)
            model.head(hidden, logits=logits.view(-1, model.vocab_size))
            accepted, token = accept_sampled(
                drafts, proposal.logits, logits, seq_lens, *sequences.noise, proposal.token_map
            )
        sequences.set_last_token(token)
        return torch.column_stack([accepted, token, drafts])

    def _accept_from_logits(self, part: _Part, proposal: DraftTensors, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Accept by processed logits: the result has their distribution, whatever the draft tokens were drawn from."""
        sequences, drafts, pipeline = part.sequences, proposal.tokens, self._pipeline
        assert pipeline is not None
        assert proposal.logits is not None
        logits, controls = self._logits(hidden), _controls_of(sequences)
        with_drafts = controls.apart()
        for index in range(hidden.shape[1]):
            logits[:, index] = pipeline(logits[:, index], with_drafts, index, part.rows)
            with_drafts.see(drafts[:, index : index + 1])
        accepted, token = accept_sampled(
            drafts, proposal.logits, logits, sequences.seq_lens, controls.draws, sequences.seed, proposal.token_map
        )
        is_accepted = torch.arange(drafts.shape[1], device=drafts.device) < accepted[:, None]
        controls.see(torch.cat([torch.where(is_accepted, drafts, token[:, None]), token[:, None]], 1))
        return accepted, token

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


@dataclass(frozen=True)
class _Part:
    """The sequences of a round whose drafts have one source; ``rows`` are theirs in the batch, None for all."""

    rows: Sequence[int] | None
    index: Tensor | None  # rows, on the device
    sequences: SequenceTensors

    def write_back(self, whole: SequenceTensors) -> None:
        """Write what a round changed into the tensors of the batch."""
        if self.index is None:
            return
        whole.token[self.index], whole.seq_lens[self.index] = self.sequences.token, self.sequences.seq_lens
        if whole.controls is not None and self.sequences.controls is not None:
            whole.controls.put_seen(self.index, self.sequences.controls)


def _split(sequences: SequenceTensors, lookup_rows: Sequence[int]) -> list[_Part]:
    """The sequences that draft, and those whose drafts were looked up."""
    drafting = [row for row in range(sequences.token.shape[0]) if row not in lookup_rows]
    parts = []
    for rows in (drafting, list(lookup_rows)):
        index = to_device(torch.tensor(rows), sequences.token.device)
        own = sequences.rows(index)
        parts.append(_Part(rows, index, replace(own, lookup=None) if rows is drafting else own))
    return parts


def _join(parts: Sequence[_Part], tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
    """The parts' tensors [b, n, ...] in the order of the batch, filled up to the largest n."""
    if parts[0].index is None:
        return tensors[0]
    batch, longest = sum(len(one) for one in tensors), max(one.shape[1] for one in tensors)
    whole = tensors[0].new_full((batch, longest, *tensors[0].shape[2:]), fill)
    for part, tensor in zip(parts, tensors, strict=True):
        whole[part.index, : tensor.shape[1]] = tensor
    return whole


def _mark_not_drafted(tokens: Tensor, probability: Tensor, draft_threshold: float) -> Tensor:
    """Replace the -1 of draft tokens that a threshold ended; one whose logits are not finite has NaN, and stays -1."""
    return torch.where((tokens < 0) & ~probability.isnan(), NOT_DRAFTED, tokens) if draft_threshold else tokens


def _apply_threshold(
    token: Tensor, logits: Tensor, drafting: Tensor, draft_threshold: float, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """The draft tokens [B], and whether drafting continues after them.

    A greedy sequence stops drafting before an improbable token. One that draws stops after it: to drop a token that
    was drawn, because it is improbable, would change the distribution of the result.
    """
    probability = logits.softmax(-1).gather(1, token.clamp_min(0)[:, None])[:, 0]
    probable = probability >= draft_threshold
    stays = drafting & (probable | (draws > 0) | (token < 0))
    return torch.where(stays, token, NOT_DRAFTED), drafting & probable


def _choose(logits: Tensor, controls: LogitsControls, seed: Tensor, position: Tensor) -> Tensor:
    """Tokens [B] of processed logits [B, V]: acceptance of no drafts only draws the next token."""
    batch, vocabulary = logits.shape
    no_drafts, no_logits = position.new_empty(batch, 0), logits.new_empty(batch, 0, vocabulary)
    return accept_sampled(no_drafts, no_logits, logits[:, None], position.clone(), controls.draws, seed).next_token


def _controls_of(sequences: SequenceTensors) -> LogitsControls:
    assert sequences.controls is not None
    return sequences.controls
