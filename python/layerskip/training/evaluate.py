"""What training did to a model: exact match, agreement of every exit with the last layer, perplexity on general text.

Run it as ``python -m layerskip.training.evaluate --model DIR --task parsing --split test --exits 2 3 4``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import TASKS, Example, load_task
from .data.text import load_text

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
    model : transformers.PreTrainedModel
        Its body must offer ``norm`` and hidden states, as the architectures of `layerskip.models` do.
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
    layers = model.config.num_hidden_layers
    for exit_layer in exits:
        if not 1 <= exit_layer <= layers:
            raise ValueError(f"exit {exit_layer} is outside 1 … {layers}")
    if not examples:
        raise ValueError("no examples to evaluate")
    agree, right = dict.fromkeys(exits, 0), dict.fromkeys(exits, 0)
    exact = tokens = 0
    for input_ids, labels in _batches(tokenizer, examples, batch_size):
        scored = labels >= 0  # [B, N]
        hidden = _hidden_states(model, input_ids.to(model.device))
        last = _argmax(model, hidden[layers][scored])
        target = labels[scored].to(last.device)
        verdict = torch.ones_like(labels, dtype=torch.bool)
        verdict[scored] = (last == target).cpu()
        exact += int(verdict.all(dim=1).sum())
        tokens += target.numel()
        for exit_layer in exits:
            choice = last if exit_layer == layers else _argmax(model, hidden[exit_layer][scored])
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
    windows = [
        piece
        for text in texts
        for piece in torch.tensor(tokenizer(text)["input_ids"]).split(window)
        if len(piece) == window
    ]
    if not windows:
        raise ValueError(f"no text is as long as a window of {window} tokens")
    if limit is not None and limit < len(windows):
        windows = [windows[index * len(windows) // limit] for index in range(limit)]
    total = 0.0
    for piece in windows:
        ids = piece.to(model.device)
        hidden = model.base_model(input_ids=ids[None, :-1]).last_hidden_state[0]  # [window - 1, D], normed
        for rows, labels in zip(hidden.split(_ROWS), ids[1:].split(_ROWS), strict=True):
            total += float(F.cross_entropy(_logits(model, rows).float(), labels, reduction="sum"))
    return math.exp(total / (len(windows) * (window - 1)))


def _batches(tokenizer: Any, examples: Sequence[Example], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and next-token labels [B, N], padded on the right, -100 where no completion token is to come."""
    encoded = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        completion = [*tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id]
        encoded.append((prompt, completion))
    encoded.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(encoded), size):
        batch = encoded[start : start + size]
        length = max(len(prompt) + len(completion) for prompt, completion in batch) - 1
        input_ids = torch.full((len(batch), length), tokenizer.eos_token_id)
        labels = torch.full((len(batch), length), -100)
        for row, (prompt, completion) in enumerate(batch):
            text = [*prompt, *completion]
            input_ids[row, : len(text) - 1] = torch.tensor(text[:-1])
            labels[row, len(prompt) - 1 : len(text) - 1] = torch.tensor(completion)
        yield input_ids, labels


def _hidden_states(model: Any, input_ids: Tensor) -> list[Tensor]:
    """The normed state after 0 … L layers. Transformers norms the last one only."""
    states = model.base_model(input_ids=input_ids, output_hidden_states=True).hidden_states
    return [*(model.base_model.norm(state) for state in states[:-1]), states[-1]]


def _logits(model: Any, rows: Tensor) -> Tensor:
    return model.get_output_embeddings()(rows)


def _argmax(model: Any, rows: Tensor) -> Tensor:
    """[R, D], normed → [R]."""
    return torch.cat([_logits(model, chunk).argmax(dim=-1) for chunk in rows.split(_ROWS)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures of one task and split, or the perplexity, as JSON."""
    from layerskip.models import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or name; smollm2-layerskip for the adapted SmolLM2")
    parser.add_argument("--task", default="parsing", choices=[*TASKS, "text"])
    parser.add_argument("--split", default="test")
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--limit", type=int, help="examples, or windows of text")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args(arguments)
    model, tokenizer = load(options.model, getattr(torch, options.dtype))
    if options.task == "text":
        print(json.dumps({"perplexity": perplexity(model, tokenizer, load_text(options.split), limit=options.limit)}))
        return
    examples = load_task(options.task, options.split)[: options.limit]
    print(json.dumps(vars(evaluate_exits(model, tokenizer, examples, options.exits))))


if __name__ == "__main__":
    main()
