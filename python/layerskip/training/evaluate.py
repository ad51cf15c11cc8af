"""What training did to a model: exact match, agreement of every exit with the last layer, perplexity on general text.

Run it as ``python -m layerskip.training.evaluate --model DIR --task parsing --split test --exits 2 3 4``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ends, devices, registry
from ..cli import names
from ..models import load
from .data import Example, documents, load_task
from .dataset import Collator, encode
from .depths import Depths, depths_of
from .loss import target_rows

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
    names.model(options.model)
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
    sys.exit(_ends.module("layerskip.training.evaluate", main))
