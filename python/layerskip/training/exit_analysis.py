"""Quality of every exit: agreement with the last layer, calibration, accuracy; perplexity of the last layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels
from layerskip_kernels import rms_norm
from layerskip_kernels.formats import plain

from ..decoding import NgramSource
from ..models import LayerSkipModel, adapt
from .batching import Collator, encode
from .data import Example
from .hf_conversion import convert, revert
from .losses import target_rows

BINS = 10  # of confidence
_ROWS = 256  # rows of logits in memory at once


@dataclass(frozen=True)
class ExitAnalysis:
    """Tokens of every exit at the same positions.

    ``tokens`` [L, R]: row l has the tokens of the exit after l + 1 layers. ``confidence`` [L, R]: the probability that
    the exit gives its token. ``lengths``: positions of each text, R in all.
    """

    tokens: Tensor
    confidence: Tensor
    lengths: tuple[int, ...]

    @property
    def agrees(self) -> Tensor:
        """Where an exit has the last layer's token, [L, R]."""
        return self.tokens == self.tokens[-1]

    def agreement(self) -> list[float]:
        """Share of positions where each exit has the last layer's token."""
        return self.agrees.double().mean(1).tolist()

    def mean_confidence(self) -> list[float]:
        return self.confidence.double().mean(1).tolist()

    def reliability(self, exit_layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, mean confidence and agreement of `BINS` equal bins of confidence; NaN where a bin is empty."""
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

    def tokens_per_round(self, exit_layer: int, num_speculations: int) -> float:
        """Mean tokens of a round that drafts up to ``num_speculations`` tokens: the accepted ones and one more."""
        agrees = self.agrees[exit_layer - 1].split(self.lengths)
        return simulate_rounds([text.tolist() for text in agrees], num_speculations)[1]

    def speedup_bound(self, exit_layer: int, num_speculations: int) -> float:
        """`speedup_bound` with the tokens per round of this exit."""
        tokens, num_layers = self.tokens_per_round(exit_layer, num_speculations), self.tokens.shape[0]
        return speedup_bound(tokens, exit_layer, 0, num_layers, num_speculations)


def simulate_rounds(agrees: Sequence[Sequence[bool]], num_speculations: int) -> tuple[tuple[float, ...], float]:
    """Simulate draft-verify rounds on texts whose ``agrees`` mark the rows where the draft token is the model's token.

    Returns the agreement rates of the first, second, … draft token of a round, each among the rounds whose earlier
    draft tokens agreed, and the mean number of tokens per round: accepted draft tokens and one of the full model.
    """
    drafted, accepted = [0] * num_speculations, [0] * num_speculations
    rounds = 0
    for text in agrees:
        position = 0
        while position < len(text):
            rounds += 1
            for number, agreed in enumerate(text[position : position + num_speculations]):
                drafted[number] += 1
                position += 1
                if not agreed:
                    break  # verification gives the token of this position
                accepted[number] += 1
            else:
                position += 1  # verification gives one more after the last draft token
    positions = tuple(yes / all_ if all_ else 0.0 for yes, all_ in zip(accepted, drafted, strict=True))
    return positions, sum(map(len, agrees)) / rounds


def speedup_bound(
    tokens_per_round: float, exit_layer: int, num_draft_layers: int, num_layers: int, num_speculations: int
) -> float:
    """Tokens per round over its cost in full passes: (K + 1) · (E + n) / L to draft, (L - E) / L to verify.

    An upper bound, which ignores the heads and that several rows cost more than one.
    """
    draft = (num_speculations + 1) * (exit_layer + num_draft_layers)
    return tokens_per_round * num_layers / (draft + num_layers - exit_layer)


@torch.no_grad()
def analyze_exits(model: Any, texts: Iterable[tuple[Tensor, int]]) -> ExitAnalysis:
    """Run every exit at every position of continuations.

    Parameters
    ----------
    model : PreTrainedModel, PeftModel or LayerSkipModel
        A causal LM that `convert` takes (it is reverted afterwards), or a model of this library.
    texts : iterable of (Tensor [S], int)
        Token ids, and the length of the prompt; the rest is the model's greedy continuation.

    Raises
    ------
    ValueError
        If no text has a continuation.
    """
    if isinstance(model, LayerSkipModel):
        exits = range(1, model.num_layers + 1)

        def layer_outputs(ids: Tensor, prompt: int) -> list[Any]:
            states = hidden_states(model, ids[None, :-1], exits)
            return [model.head(states[exit_layer][0, prompt - 1 :]) for exit_layer in exits]

        return _analyze(texts, layer_outputs, model.device)
    conversion = convert(model)

    def outputs(ids: Tensor, prompt: int) -> list[Any]:
        states = conversion.states(tuple(range(1, len(conversion.layers) + 1)), input_ids=ids[None, :-1])
        norm, head = conversion.loss.weights(states[0].dtype)
        rows = (state[0, prompt - 1 :].contiguous() for state in states)
        return [layerskip_kernels.exit_head(one, norm, head, conversion.loss.eps) for one in rows]

    try:
        return _analyze(texts, outputs, model.device)
    finally:
        revert(model)


@torch.no_grad()
def analyze_trained_exit(model: LayerSkipModel, texts: Iterable[tuple[Tensor, int]]) -> ExitAnalysis:
    """Run a trained exit and the last layer, rows 0 and 1, at every position of the texts of `analyze_exits`."""
    decoder, exit_layer, num_layers = model.decoder, model.exit_layer, model.num_layers
    if exit_layer is None:
        raise ValueError("the model has no trained exit; analyze_exits takes models without one")

    def outputs(ids: Tensor, prompt: int) -> list[Any]:
        cache = decoder.new_cache(1, len(ids))
        state = decoder.prefill(model.embed(ids[None, :-1]), cache, 0, exit_layer)
        last = decoder.prefill(state, cache, exit_layer, num_layers)
        draft = decoder.prefill(state, cache, num_layers, num_layers + decoder.num_draft_layers)
        return [model.draft_head(draft[0, prompt - 1 :]), model.head(last[0, prompt - 1 :])]

    return _analyze(texts, outputs, model.device)


def _analyze(texts: Iterable[tuple[Tensor, int]], outputs: Any, device: torch.device) -> ExitAnalysis:
    """Collect ``outputs(ids, prompt length)``: every exit's head outputs at the positions that predict new tokens."""
    tokens, confidence = [], []
    for ids, prompt in texts:
        if len(ids) > prompt:
            out = outputs(ids.to(device), prompt)
            tokens.append(torch.stack([one.token for one in out]))
            confidence.append(torch.stack([(one.logit - one.logsumexp).exp() for one in out]))
    if not tokens:
        raise ValueError("there is no continuation to analyze")
    return ExitAnalysis(torch.cat(tokens, 1), torch.cat(confidence, 1), tuple(part.shape[1] for part in tokens))


@dataclass(frozen=True)
class LookupAnalysis:
    """Draft tokens of `NgramSource` at every position of continuations.

    ``found``: positions with draft tokens. ``right``: positions where the first one is the model's token.
    """

    positions: int
    found: int
    right: int
    tokens_per_round: float


def analyze_lookup(texts: Iterable[tuple[Tensor, int]]) -> LookupAnalysis:
    """Draft by prompt lookup at every position of the texts of `analyze_exits`."""
    positions = found = right = rounds = emitted = 0
    for ids, prompt in texts:
        tokens, source = ids.tolist(), NgramSource().new()
        next_round = prompt
        for place in range(prompt, len(tokens)):
            draft = source.propose(tokens[:place])
            accepted = next(
                (count for count, (one, other) in enumerate(zip(draft, tokens[place:], strict=False)) if one != other),
                min(len(draft), len(tokens) - place),
            )
            positions, found, right = positions + 1, found + (source.match > 0), right + (accepted > 0)
            if place == next_round:
                new_tokens = min(accepted + 1, len(tokens) - place)
                rounds, emitted, next_round = rounds + 1, emitted + new_tokens, place + new_tokens
    if not positions:
        raise ValueError("there is no continuation to analyze")
    return LookupAnalysis(positions, found, right, emitted / rounds)


@dataclass(frozen=True)
class ExitReport:
    """Teacher-forced figures on the tokens of completions, with their EOS token.

    ``exact_match``: share of completions that greedy decoding generates, as every token is the last layer's arg-max.
    ``agreement[E]``: share of tokens where the exit after E layers has the last layer's token; ``accuracy[E]``: the
    label.
    """

    examples: int
    tokens: int
    exact_match: float
    agreement: dict[int, float]
    accuracy: dict[int, float]


@torch.no_grad()
def evaluate_exits(
    model: Any, tokenizer: Any, examples: Sequence[Example], exits: Sequence[int], batch_size: int = 16
) -> ExitReport:
    """Compare ``exits`` with the last layer, and all of them with the labels.

    ``model`` is a `LayerSkipModel` or one that `layerskip.models.adapt` takes. Raises ValueError for no examples, or an
    exit outside 1 … L.
    """
    model = model if isinstance(model, LayerSkipModel) else adapt(model)
    for exit_layer in exits:
        if not 1 <= exit_layer <= model.num_layers:
            raise ValueError(f"exit {exit_layer} is outside 1 … {model.num_layers}")
    if not examples:
        raise ValueError("no examples to evaluate")
    agree, right = dict.fromkeys(exits, 0), dict.fromkeys(exits, 0)
    exact = tokens = 0
    encoded = sorted(encode(tokenizer, examples), key=lambda pair: len(pair["input_ids"]))
    collate, logits = Collator(tokenizer.eos_token_id), full_head(model)
    for start in range(0, len(encoded), batch_size):
        batch = collate(encoded[start : start + batch_size])
        rows, target = (part.to(model.device) for part in target_rows(batch["labels"]))
        states = hidden_states(model, batch["input_ids"].to(model.device), (*exits, model.num_layers))
        choices = {
            exit_layer: torch.cat([logits(part).argmax(-1) for part in state.flatten(0, 1)[rows].split(_ROWS)])
            for exit_layer, state in states.items()
        }
        last = choices[model.num_layers]
        wrong = (rows // batch["labels"].shape[1])[last != target]
        exact += len(batch["labels"]) - len(wrong.unique())
        tokens += len(target)
        for exit_layer in exits:
            agree[exit_layer] += int((choices[exit_layer] == last).sum())
            right[exit_layer] += int((choices[exit_layer] == target).sum())
    return ExitReport(
        examples=len(examples),
        tokens=tokens,
        exact_match=exact / len(examples),
        agreement={exit_layer: count / tokens for exit_layer, count in agree.items()},
        accuracy={exit_layer: count / tokens for exit_layer, count in right.items()},
    )


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], window: int = 512, limit: int | None = None) -> float:
    """exp of the mean cross-entropy of the last layer over windows of ``window`` tokens.

    Takes the models of `evaluate_exits`. The first token of a window has no context and isn't scored; shorter ends of
    texts are ignored. Uses up to ``limit`` windows, spread over all.
    """
    pieces = spread(windows(tokenizer, texts, window), limit)
    model = model if isinstance(model, LayerSkipModel) else adapt(model)
    logits, total = full_head(model), 0.0
    for piece in pieces:
        ids = piece.to(model.device)
        hidden = hidden_states(model, ids[None, :-1], [model.num_layers])[model.num_layers][0]
        for rows, labels in zip(hidden.split(_ROWS), ids[1:].split(_ROWS), strict=True):
            total += float(F.cross_entropy(logits(rows).float(), labels, reduction="sum"))
    return math.exp(total / (len(pieces) * (window - 1)))


def windows(tokenizer: Any, texts: Sequence[str], window: int) -> list[Tensor]:
    every = [piece for text in texts for piece in torch.tensor(tokenizer(text).input_ids).split(window)]
    full = [piece for piece in every if len(piece) == window]
    if not full:
        raise ValueError(f"no text is as long as a window of {window} tokens")
    return full


def hidden_states(model: LayerSkipModel, input_ids: Tensor, exits: Iterable[int]) -> dict[int, Tensor]:
    """Hidden states [B, S, D] of input_ids [B, S] after each exit layer, before the final norm."""
    cache = model.decoder.new_cache(*input_ids.shape)
    state, states, start = model.embed(input_ids), {}, 0
    for exit_layer in sorted(set(exits)):
        state = states[exit_layer] = model.decoder.prefill(state, cache, start, exit_layer)
        start = exit_layer
    return states


def full_head(model: LayerSkipModel) -> Callable[[Tensor], Tensor]:
    """Return a function from hidden states [R, D] to logits [R, V], by torch's matmul."""
    head = model.head
    weight = plain(head.head_weight, model.decoder.hidden_size, model.dtype)
    return lambda hidden: F.linear(rms_norm(hidden, head.norm_weight, head.eps), weight)


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """Up to ``limit`` of the items, evenly spaced."""
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]
