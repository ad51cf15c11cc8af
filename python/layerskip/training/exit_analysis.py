"""How good every layer's exit is: agreement, calibration, perplexity, exact match."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels
from layerskip_kernels import rms_norm
from layerskip_kernels.formats import plain

from .. import _ends, devices, registry
from ..decoding import NgramSource
from ..models import LayerSkipModel, load
from .batching import Collator, encode
from .data import Example, documents, load_task
from .hf_conversion import convert, revert
from .losses import target_rows


class Depths(Protocol):
    """What an evaluation asks of a model."""

    def states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """The normed states [B, S, D] of input_ids [B, S] after so many layers, by their number."""

    def logits(self, rows: Tensor) -> Tensor:
        """[R, D], normed → [R, V]."""


def depths_of(model: Any) -> Depths:
    """Those of a model of either kind."""
    return DecoderDepths(model) if isinstance(model, LayerSkipModel) else _TransformersDepths(model)


class _TransformersDepths:
    def __init__(self, model: Any) -> None:
        self._model = model

    def states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """See `Depths`; transformers itself norms the last states only."""
        body, last = self._model.base_model, self._model.config.num_hidden_layers
        inner = any(depth != last for depth in depths)
        out = body(input_ids=input_ids, output_hidden_states=inner)
        return {d: out.last_hidden_state if d == last else body.norm(out.hidden_states[d]) for d in depths}

    def logits(self, rows: Tensor) -> Tensor:
        """See `Depths`."""
        logits: Tensor = self._model.get_output_embeddings()(rows)
        return logits / getattr(self._model.config, "logits_scaling", 1.0)  # Granite's, outside its head


class DecoderDepths:
    """Of a `LayerSkipModel`, as it reads prompts."""

    def __init__(self, model: LayerSkipModel) -> None:
        self._model = model

    @cached_property
    def _head(self) -> Tensor:
        """The head for torch's matmul."""
        return plain(self._model.head.head_weight, self._model.decoder.hidden_size, self._model.dtype)

    def raw_states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """The states [B, S, D] after so many layers, not normed."""
        decoder = self._model.decoder
        cache = decoder.new_cache(*input_ids.shape)
        state, found, start = self._model.embed(input_ids), {}, 0
        for depth in sorted(set(depths)):
            state = decoder.prefill(state, cache, start, depth)
            found[depth], start = state, depth
        return found

    def states(self, input_ids: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """See `Depths`."""
        head = self._model.head
        raw = self.raw_states(input_ids, depths)
        return {depth: rms_norm(state, head.norm_weight, head.eps) for depth, state in raw.items()}

    def logits(self, rows: Tensor) -> Tensor:
        """See `Depths`."""
        return F.linear(rows, self._head)


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


def speedup_bound(
    tokens_per_round: float, exit_layer: int, num_draft_layers: int, num_layers: int, drafts: int
) -> float:
    """Tokens a round, per cost of it in full passes: (K + 1) · (E + n) / L for the drafts, (L - E) / L to verify.

    Heads, and that several rows cost more than one, are left out, so no decoder gets more.
    """
    cost = ((drafts + 1) * (exit_layer + num_draft_layers) + num_layers - exit_layer) / num_layers
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
        drafting = decoder.prefill(state, cache, layers, layers + decoder.num_draft_layers)
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


_ROWS = 256  # rows of logits alive at once


@dataclass(frozen=True)
class ExitReport:
    """Teacher-forced figures on the completions' tokens, the end-of-text token included.

    ``exact_match`` is the share of completions whose every token is the last layer's arg-max: just those that greedy
    decoding writes. ``agreement[E]`` is the share of tokens where the exit after E layers and the last one agree,
    ``accuracy[E]`` where the exit gives the label.
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
    """Compare the exits of a causal language model with its last layer, and that with the labels.

    Parameters
    ----------
    model : transformers.PreTrainedModel or LayerSkipModel
        The body of the first must offer ``norm`` and hidden states, as the architectures of `layerskip.models` do.
    tokenizer : transformers.PreTrainedTokenizer
    examples : sequence of Example
    exits : sequence of int
        Numbers of layers, 1 … L.
    batch_size : int

    Raises
    ------
    ValueError
        For no examples, or an exit outside 1 … L.
    """
    depths = depths_of(model)
    layers = model.config.num_hidden_layers
    for exit_layer in exits:
        if not 1 <= exit_layer <= layers:
            raise ValueError(f"exit {exit_layer} is outside 1 … {layers}")
    if not examples:
        raise ValueError("no examples to evaluate")
    agree, right = dict.fromkeys(exits, 0), dict.fromkeys(exits, 0)
    exact = tokens = 0
    for batch in _batches(tokenizer, examples, batch_size):
        rows, target = (part.to(model.device) for part in target_rows(batch["labels"]))
        states = depths.states(batch["input_ids"].to(model.device), (*exits, layers))
        hidden = {depth: state.flatten(0, 1)[rows] for depth, state in states.items()}
        last = _argmax(depths, hidden[layers])
        wrong = (rows // batch["labels"].shape[1])[last != target]
        exact += len(batch["labels"]) - len(wrong.unique())
        tokens += len(target)
        for exit_layer in exits:
            choice = last if exit_layer == layers else _argmax(depths, hidden[exit_layer])
            agree[exit_layer] += int((choice == last).sum())
            right[exit_layer] += int((choice == target).sum())
    return ExitReport(
        examples=len(examples),
        tokens=tokens,
        exact_match=exact / len(examples),
        agreement={exit_layer: count / tokens for exit_layer, count in agree.items()},
        accuracy={exit_layer: count / tokens for exit_layer, count in right.items()},
    )


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], window: int = 512, limit: int | None = None) -> float:
    """exp of the mean cross-entropy of the last layer over the texts, cut into windows of ``window`` tokens.

    Parameters
    ----------
    model, tokenizer
        As `evaluate_exits` takes them.
    texts : sequence of str
    window : int
        The first token of a window has no context and isn't scored.
    limit : int, optional
        Use this many windows, spread over all of them.
    """
    pieces = spread(windows(tokenizer, texts, window), limit)
    depths, layers = depths_of(model), model.config.num_hidden_layers
    total = 0.0
    for piece in pieces:
        ids = piece.to(model.device)
        hidden = depths.states(ids[None, :-1], (layers,))[layers][0]  # [window - 1, D], normed
        for rows, labels in zip(hidden.split(_ROWS), ids[1:].split(_ROWS), strict=True):
            total += float(F.cross_entropy(depths.logits(rows).float(), labels, reduction="sum"))
    return math.exp(total / (len(pieces) * (window - 1)))


def _batches(tokenizer: Any, examples: Sequence[Example], size: int) -> Iterator[dict[str, Tensor]]:
    """Inputs and labels [B, S], batched by length."""
    encoded = sorted(encode(tokenizer, examples), key=lambda pair: len(pair["input_ids"]))
    collate = Collator(tokenizer.eos_token_id)
    for start in range(0, len(encoded), size):
        yield collate(encoded[start : start + size])


def windows(tokenizer: Any, texts: Sequence[str], window: int) -> list[Tensor]:
    """The windows of the texts; ends that are shorter are left out."""
    every = [piece for text in texts for piece in torch.tensor(tokenizer(text).input_ids).split(window)]
    whole = [piece for piece in every if len(piece) == window]
    if not whole:
        raise ValueError(f"no text is as long as a window of {window} tokens")
    return whole


def _argmax(depths: Depths, rows: Tensor) -> Tensor:
    """[R, D], normed → [R]."""
    return torch.cat([depths.logits(chunk).argmax(dim=-1) for chunk in rows.split(_ROWS)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures of one task and split, or the perplexity, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-layerskip", help="as `layerskip.load` takes it")
    parser.add_argument("--task", default="parsing", help="of one with long texts, such as text, the perplexity")
    parser.add_argument("--split", default="test")
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--limit", type=int, help="use this many examples, or windows of text, spread over all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weights", help="quantize, as `layerskip.load` does: int8, int4, … or native")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto, a card where torch sees one")
    _ends.declare(parser)
    options = parser.parse_args(arguments)
    registry.check_model(options.model)
    long = hasattr(registry.get(registry.TASKS, options.task), "documents")
    texts: list[Any] = (documents if long else load_task)(options.task, options.split)
    device = devices.find(options.device)
    model, tokenizer = load(options.model, getattr(torch, options.dtype), options.weights)
    model.to(device)
    if long:
        print(json.dumps({"perplexity": perplexity(model, tokenizer, texts, limit=options.limit)}))
        return
    examples = spread(texts, options.limit)
    print(json.dumps(vars(evaluate_exits(model, tokenizer, examples, options.exits))))


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """``limit`` of the items, evenly spaced."""
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


if __name__ == "__main__":
    sys.exit(_ends.module("layerskip.training.exit_analysis", main))
