"""How good every layer's exit is on text that the model itself writes: what a choice of E rests on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels

from ..decoding import NgramSource
from ..models import LayerSkipModel
from .conversion import convert, revert
from .depths import DecoderDepths

BINS = 10


@dataclass(frozen=True)
class ExitSurvey:
    """Choices of every exit on the same positions.

    ``tokens`` [L, R]: row l is what the exit after l + 1 layers would write at each position; the last row is what the
    model writes. ``confidence`` [L, R]: the probability that the exit gives to its choice. ``lengths``: how many of the
    R positions each text has, in order.
    """

    tokens: Tensor
    confidence: Tensor
    lengths: tuple[int, ...]

    @property
    def agrees(self) -> Tensor:
        """Where an exit's choice is the full depth's, [L, R]."""
        return self.tokens == self.tokens[-1]

    def agreement(self) -> list[float]:
        """Share of positions where each exit agrees with the full depth."""
        return self.agrees.double().mean(1).tolist()

    def mean_confidence(self) -> list[float]:
        """Mean probability of each exit's choice."""
        return self.confidence.double().mean(1).tolist()

    def reliability(self, exit_layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of `BINS` equal bins of confidence: positions, mean confidence, agreement; NaN where a bin is empty."""
        confidence, agrees = self.confidence[exit_layer - 1].double(), self.agrees[exit_layer - 1].double()
        bins = (confidence * BINS).long().clamp(0, BINS - 1)
        count = torch.bincount(bins, minlength=BINS).double()
        sums = (torch.bincount(bins, weights=values, minlength=BINS) for values in (confidence, agrees))
        mean_confidence, agreement = (total / count for total in sums)
        return count, mean_confidence, agreement

    def calibration_error(self, exit_layer: int) -> float:
        """Expected calibration error (Guo et al. 2017): Σ share of bin · |confidence - agreement| in it."""
        count, confidence, agreement = self.reliability(exit_layer)
        return float(((confidence - agreement).abs().nan_to_num(0) * count).sum() / count.sum())

    def tokens_per_round(self, exit_layer: int, drafts: int) -> float:
        """Mean tokens that a round emits which drafts ``drafts`` tokens at an exit: the accepted ones and one more.

        On the model's own text an exit drafts just what is counted here, as long as it agrees.
        """
        rounds = emitted = 0
        for agrees in self.agrees[exit_layer - 1].split(self.lengths):
            position, flags = 0, agrees.tolist()
            while position < len(flags):
                accepted = 0
                while accepted < min(drafts, len(flags) - position - 1) and flags[position + accepted]:
                    accepted += 1
                position, rounds, emitted = position + accepted + 1, rounds + 1, emitted + accepted + 1
        return emitted / rounds

    def speedup_bound(self, exit_layer: int, drafts: int) -> float:
        """See `speedup_bound`, of a round with as many tokens as here."""
        return speedup_bound(self.tokens_per_round(exit_layer, drafts), exit_layer, 0, self.tokens.shape[0], drafts)


def speedup_bound(tokens_per_round: float, exit_layer: int, num_blocks: int, num_layers: int, drafts: int) -> float:
    """Tokens a round, per cost of it in full passes: (K + 1) · (E + n) / L for the drafts, (L - E) / L to verify.

    Heads, and that several rows cost more than one, are left out, so no decoder gets more.
    """
    cost = ((drafts + 1) * (exit_layer + num_blocks) + num_layers - exit_layer) / num_layers
    return tokens_per_round / cost


@torch.no_grad()
def survey_exits(model: Any, texts: Iterable[tuple[Tensor, int]]) -> ExitSurvey:
    """Ask every exit at every position of the continuations.

    Parameters
    ----------
    model : PreTrainedModel or LayerSkipModel
        A causal LM that `convert` takes, which is given back as it was; or a model of this library.
    texts : iterable of (Tensor [S], int)
        Token ids, and how many of them are the prompt, of which the rest is the greedy continuation.

    Raises
    ------
    ValueError
        If no text has a continuation.
    """
    if isinstance(model, LayerSkipModel):
        return _survey_layers(model, texts)
    conversion = convert(model)
    exits = tuple(range(1, len(conversion.layers) + 1))
    tokens, confidence = [], []
    try:
        for ids, prompt in texts:
            if len(ids) <= prompt:
                continue
            states = conversion.states(exits, input_ids=ids[None, :-1].to(model.device))
            hiddens = torch.stack([state[0, prompt - 1 :] for state in states])  # [L, R, D]
            norm, head = conversion.loss.weights(hiddens.dtype)
            out = layerskip_kernels.exit_head(hiddens.flatten(0, 1), norm, head, conversion.loss.eps)
            tokens.append(out.token.view(len(exits), -1))
            confidence.append((out.logit - out.logsumexp).exp().view(len(exits), -1))
    finally:
        revert(model)
    return _survey_of(tokens, confidence)


def _survey_layers(model: LayerSkipModel, texts: Iterable[tuple[Tensor, int]]) -> ExitSurvey:
    """As `survey_exits`, with the model's own layers and head."""
    depths, exits = DecoderDepths(model), range(1, model.num_layers + 1)
    tokens, confidence = [], []
    for ids, prompt in texts:
        if len(ids) > prompt:
            states = depths.raw_states(ids[None, :-1].to(model.device), exits)
            out = [model.head(states[exit_layer][0, prompt - 1 :]) for exit_layer in exits]
            tokens.append(torch.stack([one.token for one in out]))
            confidence.append(torch.stack([(one.logit - one.logsumexp).exp() for one in out]))
    return _survey_of(tokens, confidence)


@torch.no_grad()
def survey_trained_exit(model: LayerSkipModel, texts: Iterable[tuple[Tensor, int]]) -> ExitSurvey:
    """Ask what drafts for a model at every position of the continuations.

    Parameters
    ----------
    model : LayerSkipModel
        With an exit after one of its layers.
    texts : iterable of (Tensor [S], int)
        As `survey_exits` takes them.

    Returns
    -------
    ExitSurvey
        Of two rows: the exit, and the full depth.
    """
    decoder, exit_layer, layers = model.decoder, model.exit_layer, model.num_layers
    if exit_layer is None:
        raise ValueError("the model has no exit of its own; survey_exits asks all of its layers")
    tokens, confidence = [], []
    for ids, prompt in texts:
        if len(ids) <= prompt:
            continue
        cache = decoder.new_cache(1, len(ids))
        state = decoder.prefill(model.embed(ids[None, :-1].to(model.device)), cache, 0, exit_layer)
        last = decoder.prefill(state, cache, exit_layer, layers)
        drafting = decoder.prefill(state, cache, layers, layers + decoder.num_blocks)
        out = [model.draft_head(drafting[0, prompt - 1 :]), model.head(last[0, prompt - 1 :])]
        tokens.append(torch.stack([one.token for one in out]))
        confidence.append(torch.stack([(one.logit - one.logsumexp).exp() for one in out]))
    return _survey_of(tokens, confidence)


@dataclass(frozen=True)
class NgramSurvey:
    """What `NgramSource` proposes at every position of the continuations.

    ``found``: how many positions have a proposal; ``right``: of how many its first token is the model's.
    ``tokens_per_round``: the mean tokens that a round emits, with all that is proposed.
    """

    positions: int
    found: int
    right: int
    tokens_per_round: float


def survey_ngrams(texts: Iterable[tuple[Tensor, int]]) -> NgramSurvey:
    """Look up what follows at every position, in the text so far.

    Parameters
    ----------
    texts : iterable of (Tensor [S], int)
        As `survey_exits` takes them.
    """
    positions = found = right = rounds = emitted = 0
    for ids, prompt in texts:
        tokens, source = ids.tolist(), NgramSource().new()
        next_round = prompt
        for place in range(prompt, len(tokens)):
            accepted = _leading(source.propose(tokens[:place]), tokens[place:])
            positions, found, right = positions + 1, found + (source.match > 0), right + (accepted > 0)
            if place == next_round:
                tokens_of_round = min(accepted + 1, len(tokens) - place)
                rounds, emitted, next_round = rounds + 1, emitted + tokens_of_round, place + tokens_of_round
    if not positions:
        raise ValueError("there is no continuation to look at")
    return NgramSurvey(positions, found, right, emitted / rounds)


def _leading(drafts: Sequence[int], tokens: Sequence[int]) -> int:
    """How many drafts at the beginning are the tokens."""
    pairs = enumerate(zip(drafts, tokens, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(drafts), len(tokens)))


def _survey_of(tokens: list[Tensor], confidence: list[Tensor]) -> ExitSurvey:
    if not tokens:
        raise ValueError("there is no continuation to look at")
    return ExitSurvey(torch.cat(tokens, 1), torch.cat(confidence, 1), tuple(part.shape[1] for part in tokens))
