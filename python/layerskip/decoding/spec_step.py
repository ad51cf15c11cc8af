"""One step of a batch on the device: prefill's first token, one token per sequence, or one speculative round.

Every step gives one tensor [B, 2 + K] int64, which is all that the host reads: the number of accepted draft tokens, the
token that follows them, the K draft tokens. A token is -1 where logits are not finite; a draft token is `NOT_DRAFTED`
where none was made.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip_kernels import Noise, accept_greedy, accept_sampled

from ..devices import to_device
from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from .sampling import LogitsControls, LogitsPipeline, TensorGroup

NOT_DRAFTED = -2
# The token that replaces a rejected draft must not be drawn with the noise that the draft was drawn with.
_DRAFT_SEED = 0x5851F42D4C957F2D


class SpecStep:
    """The steps of a batch; `speculate` is LayerSkip's round (arXiv 2404.16710, section 4.3).

    ``cache`` has room for K + 1 more positions of every sequence. ``pipeline`` has the requests' own logits processors.
    With ``may_sync`` drafting may look at values on the host to stop early; a recorded step cannot.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        cache: SharedKVCache,
        pipeline: LogitsPipeline | None = None,
        may_sync: bool = False,
    ) -> None:
        self._model, self._cache, self._may_sync = model, cache, may_sync
        self._pipeline = LogitsPipeline() if pipeline is None else pipeline

    @property
    def failures(self) -> dict[int, Exception]:
        """Exceptions of the sequences' own logits processors, by index."""
        return self._pipeline.failures

    def first(self, hidden: Tensor, sequences: SequenceTensors) -> Tensor:
        """The tokens [B] that follow the prompts, from the states [B, D] of the prompts' last tokens.

        ``sequences.seq_lens`` are the positions of these last tokens.
        """
        if (controls := sequences.controls) is not None:
            logits = self._pipeline(self._logits(hidden), controls, 0, range(len(hidden)))
            return _choose(logits, controls, sequences.seed, sequences.seq_lens)
        noise = sequences.noise
        return self._model.head(hidden, *(() if noise is None else (*noise, sequences.seq_lens))).token

    def advance(self, sequences: SequenceTensors, num_layers: int) -> Tensor:
        """Decode one token with layers [0, num_layers): all layers, or an early exit without verification."""
        model, places = self._model, sequences.places
        if sequences.controls is None:
            token = model.decode(sequences.token, self._cache, num_layers, noise=sequences.noise, **places)
        else:
            hidden = model.read(sequences.token[:, None], self._cache, num_layers, **places)
            token = self.first(hidden[:, 0], sequences)
            sequences.controls.see(token[:, None])
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

        The fused call computes the same round, with the same bits, without logits processing or lookup drafts.

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
        model, lookup, num_layers = self._model, sequences.lookup, self._model.num_layers
        if exit_layer is None or (lookup is not None and lookup_rows is None):
            exit_layer = num_layers  # lookup drafts alone need no exit: one pass through all layers reads them
        if lookup is None and sequences.controls is None and model.decoder.ops is None:
            done = model.speculate(
                sequences.token, self._cache, exit_layer, num_speculations, draft_threshold=draft_threshold,
                noise=sequences.noise, **sequences.places,
            )  # fmt: skip
            sequences.set_last_token(done.next_token)
            drafts = _mark_not_drafted(done.tokens, done.probability, draft_threshold)
            return torch.column_stack([done.accepted, done.next_token, drafts])

        # Draft K tokens, and keep the states after layer E of the last token and of every draft token.
        parts = _split(sequences, lookup_rows)
        drafted = [
            self._draft(part, exit_layer, num_speculations, draft_threshold)
            if part.sequences.lookup is None
            else self._look_up(part, part.sequences.lookup, exit_layer)
            for part in parts
        ]
        # Verify them in one pass of layers [E, L). Drafting left its keys and values of layers [0, E) in the one KV
        # cache, so nothing is computed twice.
        hidden = _join(parts, [draft.states for draft in drafted])
        if exit_layer < num_layers:
            places = sequences.seq_lens, sequences.slots
            hidden = model.decoder.forward(hidden, self._cache, exit_layer, num_layers, *places)
        # Accept the leading draft tokens that the full model agrees with, and its own token after them. `seq_lens`
        # advances by as many. That is the rollback: nothing beyond it is read before it is written again.
        results = []
        for part, draft in zip(parts, drafted, strict=True):
            results.append(self._accept(part, draft, hidden[part.at, : draft.states.shape[1]]))
            part.write_back(sequences)
        return _join(parts, results, NOT_DRAFTED)

    def _draft(self, part: _Part, exit_layer: int, num_speculations: int, draft_threshold: float) -> DraftTensors:
        """Draft with layers [0, E), the exit's draft layers and its head."""
        sequences, head, logits = part.sequences, self._model.draft_head, None
        if sequences.controls is not None:
            return self._draft_from_logits(part, sequences.controls, exit_layer, num_speculations, draft_threshold)
        if sequences.noise is not None:
            size = (sequences.token.shape[0], num_speculations, head.num_rows)
            logits = torch.empty(size, dtype=torch.float32, device=sequences.token.device)
        made = self._model.draft(
            sequences.token, self._cache, exit_layer, num_speculations, draft_threshold=draft_threshold,
            noise=sequences.noise, logits=logits, **sequences.places,
        )  # fmt: skip
        tokens, states = _mark_not_drafted(made.tokens, made.probability, draft_threshold), made.states
        if draft_threshold and logits is None and self._may_sync:
            longest = int((tokens != NOT_DRAFTED).any(0).sum())
            tokens, states = tokens[:, :longest], states[:, : longest + 1]
        return DraftTensors(tokens, states, logits, head.token_map)

    def _draft_from_logits(
        self, part: _Part, controls: LogitsControls, exit_layer: int, num_speculations: int, draft_threshold: float
    ) -> DraftTensors:
        """Draft from processed logits over the vocabulary: a draft token that the target cannot emit is useless.

        K is ``num_speculations``, or fewer where no sequence has a use for more draft tokens.
        """
        model, sequences, pipeline = self._model, part.sequences, self._pipeline
        decoder, token, controls = model.decoder, sequences.token, controls.apart()
        batch, device = token.shape[0], token.device
        drafts = token.new_empty(batch, num_speculations)
        states = torch.empty(batch, num_speculations + 1, decoder.hidden_size, dtype=model.dtype, device=device)
        logits = torch.empty(batch, num_speculations, model.vocab_size, dtype=torch.float32, device=device)
        drafting = torch.ones_like(token, dtype=torch.bool)
        for row in range(num_speculations + 1):  # the last draft token, too: verification needs its keys and values
            position, slots = sequences.seq_lens + row, sequences.slots
            rows = token.clamp_min(0)[:, None]
            hidden = model.read(rows, self._cache, exit_layer, seq_lens=position, slots=slots)
            states[:, row] = hidden[:, 0]
            if decoder.num_draft_layers:
                first, last = decoder.num_layers, decoder.num_layers + decoder.num_draft_layers
                hidden = decoder.forward(hidden, self._cache, first, last, position, slots)
            if row == num_speculations or (row and self._may_sync and not bool(drafting.any())):
                break
            scores = self._logits(hidden[:, 0], model.draft_head)
            scores = logits[:, row] = pipeline(scores, controls, row, part.rows)
            token = _choose(scores, controls, sequences.seed ^ _DRAFT_SEED, position)
            drafting = drafting & scores.ne(-math.inf).any(-1)  # a reduced head may score no token that is allowed
            token = torch.where(drafting, token, NOT_DRAFTED)
            if draft_threshold:
                token, drafting = _apply_threshold(token, scores, drafting, draft_threshold, controls.draws)
            controls.see(token[:, None])
            pipeline.put_drafts(row, token, part.rows)
            drafts[:, row] = token
        return DraftTensors(drafts[:, :row], states[:, : row + 1], logits[:, :row], None)

    def _look_up(self, part: _Part, lookup: LookupDrafts, num_layers: int) -> DraftTensors:
        """Take the lookup drafts, and run layers [0, num_layers) on them in one pass."""
        sequences, tokens = part.sequences, lookup.tokens
        rows = torch.column_stack([sequences.token, tokens]).clamp_min(0)  # a draft that is missing is any token
        states = self._model.read(rows, self._cache, num_layers, **sequences.places)
        for index in range(tokens.shape[1]):
            self._pipeline.put_drafts(index, tokens[:, index], part.rows)
        return DraftTensors(tokens, states, lookup.logits if sequences.draws else None, lookup.token_map)

    def _accept(self, part: _Part, draft: DraftTensors, hidden: Tensor) -> Tensor:
        """Accept draft tokens by the states ``hidden`` [B, K + 1, D] after the last layer.

        Sampled tokens have the distribution of the (processed) logits, whatever the draft tokens were drawn from. A
        lookup draft is drawn from a distribution of one token: it is accepted with the probability p that the model
        gives it, and else a token is drawn from p without it (Leviathan et al. 2023).
        """
        sequences, controls, tokens = part.sequences, part.sequences.controls, draft.tokens
        temperature = sequences.temperature if controls is None else controls.draws
        if temperature is None or draft.logits is None:
            target = self._model.head(hidden.flatten(0, 1)).token.view(hidden.shape[:2])
            accepted, token = accept_greedy(tokens, target, sequences.seq_lens)
        else:
            logits = self._logits(hidden)
            if controls is not None:
                with_drafts = controls.apart()
                for row in range(hidden.shape[1]):
                    logits[:, row] = self._pipeline(logits[:, row], with_drafts, row, part.rows)
                    with_drafts.see(tokens[:, row : row + 1])
            accepted, token = accept_sampled(
                tokens, draft.logits, logits, sequences.seq_lens, temperature, sequences.seed, draft.token_map
            )
        if controls is not None:
            is_accepted = torch.arange(tokens.shape[1], device=tokens.device) < accepted[:, None]
            controls.see(torch.column_stack([torch.where(is_accepted, tokens, token[:, None]), token]))
        sequences.set_last_token(token)
        return torch.column_stack([accepted, token, tokens])

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


class DraftTensors(NamedTuple):
    """Draft tokens, from any source, as verification takes them."""

    tokens: Tensor  # [B, K]; `NOT_DRAFTED` from where a sequence has none
    states: Tensor  # [B, K + 1, D]: of the last token and the draft tokens, after the layer that verification begins at
    logits: Tensor | None  # [B, K, S]: what draft tokens were drawn from, if any sequence draws
    token_map: Tensor | None  # [S]: the tokens of these logits; None for the whole vocabulary


@dataclass(frozen=True)
class LookupDrafts(TensorGroup):
    """Draft tokens from earlier text or another source without an exit."""

    tokens: Tensor  # [B, K]
    token_map: Tensor | None  # [S]: each of these tokens once, if any sequence draws

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
class SequenceTensors(TensorGroup):
    """The state of the sequences of a round: entry b of every tensor belongs to sequence b.

    A round rewrites the first two tensors in place, and the tokens that the controls have seen.
    """

    token: Tensor  # [B], int64: the last tokens, which are not in the cache yet
    seq_lens: Tensor  # [B], int64: their positions, which are also the lengths of the cache
    slots: Tensor  # [B], int64: rows of the cache
    seed: Tensor  # [B], int64: seed and position determine the noise that a token is drawn with
    temperature: Tensor | None = None  # [B], fp32; None if every sequence is greedy
    lookup: LookupDrafts | None = None  # drafts of the next round that no exit makes
    controls: LogitsControls | None = None  # None if logits are not processed

    @property
    def places(self) -> dict[str, Any]:
        """Lengths and slots, as keyword arguments of the model's methods."""
        return {"seq_lens": self.seq_lens, "slots": self.slots}

    @property
    def noise(self) -> Noise | None:
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

    def set_last_token(self, token: Tensor) -> None:
        """Set the last tokens, and token 0 in the place of -1.

        A token is -1 where logits are not finite, which ends its sequence. The next round may begin before the host has
        read that, and the embedding has no row -1.
        """
        torch.clamp(token, min=0, out=self.token)

    def copy_(self, other: SequenceTensors) -> None:
        """Take the values of ``other``, which has the same form; nothing is done for a tensor that both share."""
        pairs = [pair for pair in zip(self.tensors, other.tensors, strict=True) if pair[0] is not pair[1]]
        integers = [pair for pair in pairs if pair[0].dtype == torch.int64]
        if integers:
            mine, theirs = zip(*integers, strict=True)
            torch._foreach_copy_(mine, theirs)  # one launch
        for one, value in pairs:
            if one.dtype != torch.int64:
                one.copy_(value)

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


class _Part(NamedTuple):
    """The sequences of a round whose drafts have one source, and which of the batch they are."""

    sequences: SequenceTensors
    rows: Sequence[int]
    at: Tensor | slice  # rows, on the device

    def write_back(self, whole: SequenceTensors) -> None:
        """Write what a round changed into the tensors of the batch."""
        if self.sequences is whole:
            return
        whole.token[self.at], whole.seq_lens[self.at] = self.sequences.token, self.sequences.seq_lens
        if whole.controls is not None and self.sequences.controls is not None:
            whole.controls.put_seen(self.at, self.sequences.controls)


def _split(sequences: SequenceTensors, lookup_rows: Sequence[int] | None) -> list[_Part]:
    """The sequences that draft, and those with lookup drafts; one part without ``lookup_rows``."""
    all_rows, lookup = range(sequences.token.shape[0]), sequences.lookup
    if lookup is None or lookup_rows is None:
        return [_Part(sequences, all_rows, slice(None))]
    parts = []
    for rows in ([row for row in all_rows if row not in lookup_rows], lookup_rows):
        index = to_device(torch.tensor(rows), sequences.token.device)
        own = replace(sequences, lookup=None).each(lambda tensor, index=index: tensor[index])  # type: ignore[misc]
        if rows is lookup_rows:
            own = replace(own, lookup=replace(lookup, tokens=lookup.tokens[index]))
        parts.append(_Part(own, rows, index))
    return parts


def _join(parts: Sequence[_Part], tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
    """The parts' tensors [b, n, ...] in the order of the batch, filled up to the largest n."""
    if len(parts) == 1:
        return tensors[0]
    batch, longest = sum(len(one) for one in tensors), max(one.shape[1] for one in tensors)
    whole = tensors[0].new_full((batch, longest, *tensors[0].shape[2:]), fill)
    for part, tensor in zip(parts, tensors, strict=True):
        whole[part.at, : tensor.shape[1]] = tensor
    return whole
