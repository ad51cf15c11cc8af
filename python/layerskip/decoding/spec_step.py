"""One round of self-speculative decoding: draft, verify, accept, roll back.

Every round gives one tensor [B, 2 + K] int64, which is all that the host reads: the number of accepted drafts, the
token that follows them, the K drafts. A token is -1 where logits are not finite; a draft is `NOT_DRAFTED` where
none was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import Noise, accept_greedy, accept_sampled
from layerskip_kernels.composition import draft_loop

from ..devices import to_device
from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .sampling import History, LogitsControls, LogitsProcessor

NOT_DRAFTED = -2


class Drafted(NamedTuple):
    """Drafts, whoever made them, as verification takes them.

    ``tokens`` [B, K] are `NOT_DRAFTED` from where a sequence has none. ``states`` [B, K + 1, D] are those of the last
    token and the drafts after the layer from which they are verified. Where tokens are drawn, the drafts are drawn from
    ``logits`` [B, K, S] over the tokens ``token_map`` [S], or over the vocabulary.
    """

    tokens: Tensor
    states: Tensor
    logits: Tensor | None
    token_map: Tensor | None


class LookedUp(NamedTuple):
    """Drafts that were looked up, ``tokens`` [B, K].

    Where tokens are drawn, ``token_map`` [S] holds each of them once.
    """

    tokens: Tensor
    token_map: Tensor | None

    @classmethod
    def of(
        cls, drafts: Sequence[Sequence[int]], most: int, vocab_size: int, device: torch.device, draws: bool
    ) -> LookedUp:
        """The tensors of what the host knows; their sizes depend only on B and K, which is ``most``.

        They go to the device in copies for which the host does not wait.
        """
        padded = [[*draft, *[NOT_DRAFTED] * (most - len(draft))] for draft in drafts]
        tokens = to_device(torch.tensor(padded, dtype=torch.int64), device)
        if not draws:
            return cls(tokens, None)
        known = {token for draft in drafts for token in draft}
        size = min(max(1, len(drafts) * most), vocab_size)
        others = (token for token in range(vocab_size) if token not in known)
        return cls(tokens, to_device(torch.tensor([*known, *islice(others, size - len(known))]), device))

    @property
    def logits(self) -> Tensor:
        """[B, K, S]: each draft was certain to be what it is."""
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
    looked_up : LookedUp or None
        The drafts of the next round, where no exit makes them.
    controls : LogitsControls or None
        How logits are processed, where they are.
    """

    token: Tensor
    seq_lens: Tensor
    slots: Tensor
    seed: Tensor
    temperature: Tensor | None = None
    looked_up: LookedUp | None = None
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
        looked_up = self.looked_up
        if looked_up is not None:
            token_map = None if looked_up.token_map is None else looked_up.token_map.clone()
            looked_up = LookedUp(looked_up.tokens.clone(), token_map)
        return self._each(Tensor.clone, looked_up)

    def rows(self, index: Tensor) -> SequenceTensors:
        """Some of the sequences, in new tensors."""
        looked_up = self.looked_up
        if looked_up is not None:
            looked_up = looked_up._replace(tokens=looked_up.tokens[index])
        return self._each(lambda tensor: tensor[index], looked_up)

    def _each(self, change: Callable[[Tensor], Tensor], looked_up: LookedUp | None) -> SequenceTensors:
        temperature = None if self.temperature is None else change(self.temperature)
        controls = None if self.controls is None else self.controls.each(change)
        token, seq_lens, slots, seed = map(change, (self.token, self.seq_lens, self.slots, self.seed))
        return SequenceTensors(token, seq_lens, slots, seed, temperature, looked_up, controls)

    def go_on(self, token: Tensor) -> None:
        """Let these tokens be the last ones.

        One of logits that are not finite is -1, and ends its sequence; but the host may not have read that when the
        next round begins, and the embedding has no such token. So it goes on with token 0, to no effect.
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
        looked_up = [tensor for tensor in self.looked_up or () if tensor is not None]
        return [self.token, self.seq_lens, self.slots, self.seed, *temperature, *looked_up, *controls]

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


class FusedRound:
    """Rounds in which one fused call drafts, verifies and chooses the tokens, and no logits are written.

    `LogitsRound` has the same methods, for sequences whose logits are processed.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
        With room for K + 1 more positions of every sequence.
    """

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache) -> None:
        self._model, self._cache = model, cache

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index: there are none."""
        return {}

    def first(self, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """The tokens [B] that follow the prompts, from the states [B, D] of the prompts' last tokens.

        ``sequences.seq_lens`` are the positions of these last tokens.
        """
        if sequences.noise is None:
            return self._model.head(hidden).token
        return self._model.head(hidden, *sequences.noise, sequences.seq_lens).token

    def advance(self, sequences: SequenceTensors, exit_layer: int) -> Tensor:
        """Decode one token with layers [0, exit_layer): with all layers, or with an early exit and no verification.

        Parameters
        ----------
        sequences : SequenceTensors
            Advanced by the token.
        exit_layer : int

        Returns
        -------
        Tensor [B, 2], int64
        """
        token = self._model.decode(
            sequences.token,
            self._cache,
            exit_layer,
            seq_lens=sequences.seq_lens,
            slots=sequences.slots,
            noise=sequences.noise,
        )
        sequences.go_on(token)
        sequences.seq_lens.add_(1)
        return F.pad(token[:, None], (1, 0))

    def speculate(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Tensor:
        """Draft with layers [0, E) and draft layers, verify with [E, L), accept (Elhoushi et al. 2024, section 4.3).

        Drafting and verification share the weights, the cache and the states after layer E, so nothing that a draft
        computed is computed again.

        Parameters
        ----------
        sequences : SequenceTensors
            Advanced to the last token of what was accepted.
        exit_layer, num_speculations : int
            E and K.
        draft_threshold : float
            A greedy draft ends before a token less probable than this; 0 where sequences draw.

        Returns
        -------
        Tensor [B, 2 + K], int64
        """
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
        sequences.go_on(done.next_token)
        drafts = _made(done.tokens, done.probability, draft_threshold)
        return torch.column_stack([done.accepted, done.next_token, drafts])

    def verify(self, sequences: SequenceTensors) -> Tensor:
        """Verify what was looked up, through all layers in one pass, and accept.

        A looked-up draft is drawn from a distribution of one token. So where tokens are drawn, it is accepted with the
        probability p that the model gives it, and else a token is drawn from p without it (Leviathan et al. 2023).

        Parameters
        ----------
        sequences : SequenceTensors
            With `LookedUp` drafts. Advanced to the last token of what was accepted.

        Returns
        -------
        Tensor [B, 2 + K], int64
        """
        drafted = self.look_up(sequences)
        return self.accept(drafted, drafted.states, sequences)

    def draft(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float = 0.0
    ) -> Drafted:
        """The first half of `speculate`: drafts, and states after layer E."""
        head, logits = self._model.draft_head, None
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
        return Drafted(_made(made.tokens, made.probability, draft_threshold), made.states, logits, head.token_map)

    def look_up(self, sequences: SequenceTensors, end: int | None = None) -> Drafted:
        """The looked-up drafts, and their states after layers [0, end)."""
        return looked_up_states(self._model, self._cache, sequences, end)

    def accept(self, drafted: Drafted, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """Accept drafts by the states ``hidden`` [B, K + 1, D] after the last layer; the result is a round's."""
        model, noise = self._model, sequences.noise
        if noise is None:
            target = model.head(hidden.flatten(0, 1)).token.view(hidden.shape[:2])
            accepted, token = accept_greedy(drafted.tokens, target, sequences.seq_lens)
        else:
            assert drafted.logits is not None
            logits = hidden.new_empty((*hidden.shape[:2], model.vocab_size), dtype=torch.float32)
            model.head(hidden, logits=logits.view(-1, model.vocab_size))
            accepted, token = accept_sampled(
                drafted.tokens, drafted.logits, logits, sequences.seq_lens, *noise, drafted.token_map
            )
        sequences.go_on(token)
        return torch.column_stack([accepted, token, drafted.tokens])


def _made(tokens: Tensor, probability: Tensor, draft_threshold: float) -> Tensor:
    """The drafts of an op, which gives -1 for those that were not made: they have a probability.

    One of logits that are not finite has NaN, and stays -1.
    """
    return torch.where((tokens < 0) & ~probability.isnan(), NOT_DRAFTED, tokens) if draft_threshold else tokens


def looked_up_states(
    model: LayerSkipModel, cache: SharedKVCache, sequences: SequenceTensors, end: int | None
) -> Drafted:
    """The looked-up drafts of some sequences, and their states after layers [0, end), or all layers."""
    assert sequences.looked_up is not None
    tokens, token_map = sequences.looked_up
    rows = torch.column_stack([sequences.token, tokens]).clamp_min(0)  # a draft that is missing is any token
    states = model.read(rows, cache, end, seq_lens=sequences.seq_lens, slots=sequences.slots)
    return Drafted(tokens, states, sequences.looked_up.logits if sequences.draws else None, token_map)


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
            return self._draft_layers(states[:, index], sequences, index)

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

    def _draft_layers(self, hidden: Tensor, sequences: SequenceTensors, offset: int) -> Tensor:
        """The states [B, D] after the exit's draft layers."""
        decoder, lengths = self._model.decoder, sequences.seq_lens + offset
        if not decoder.num_draft_layers:
            return hidden
        layers = decoder.num_layers, decoder.num_layers + decoder.num_draft_layers
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


class MixedRound:
    """Both kinds of drafts meet after layer E, and the layers after it are read once for all.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    drafting, looking_up : (FusedRound or LogitsRound, sequence of int)
        The round of the sequences for which an exit drafts, and which they are; the same of the others.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        drafting: tuple[FusedRound | LogitsRound, Sequence[int]],
        looking_up: tuple[FusedRound | LogitsRound, Sequence[int]],
    ) -> None:
        self._model, self._cache = model, cache
        (self._drafting, drafts), (self._looking_up, looks_up) = drafting, looking_up
        self._rows = [to_device(torch.tensor(rows), model.device) for rows in (drafts, looks_up)]
        self._numbers = (drafts, looks_up)

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index."""
        rounds = zip((self._drafting, self._looking_up), self._numbers, strict=True)
        return {rows[index]: error for round_, rows in rounds for index, error in round_.failures.items()}

    def speculate(
        self, sequences: SequenceTensors, exit_layer: int, num_speculations: int, draft_threshold: float
    ) -> Tensor:
        """As `FusedRound.speculate`; the sequences' `LookedUp` drafts are those of the others.

        Returns
        -------
        Tensor [B, 2 + K], int64
            K is the larger of ``num_speculations`` and what was looked up.
        """
        own = [sequences.rows(rows) for rows in self._rows]
        parts = [
            self._drafting.draft(own[0], exit_layer, num_speculations, draft_threshold),
            self._looking_up.look_up(own[1], exit_layer),
        ]
        most, batch = max(part.tokens.shape[1] for part in parts), sequences.token.shape[0]
        states = parts[0].states.new_zeros(batch, most + 1, parts[0].states.shape[2])
        for rows, part in zip(self._rows, parts, strict=True):
            states[rows, : part.states.shape[1]] = part.states
        hidden = self._model.decoder.forward(
            states, self._cache, exit_layer, self._model.num_layers, sequences.seq_lens, sequences.slots
        )
        result = sequences.token.new_full((batch, 2 + most), NOT_DRAFTED)
        rounds = (self._drafting, self._looking_up)
        for round_, rows, part, some in zip(rounds, self._rows, parts, own, strict=True):
            accepted = round_.accept(part, hidden[rows, : part.states.shape[1]], some)
            result[rows, : accepted.shape[1]] = accepted
            sequences.token[rows], sequences.seq_lens[rows] = some.token, some.seq_lens
            if sequences.controls is not None and some.controls is not None:
                sequences.controls.put_seen(rows, some.controls)
        return result
