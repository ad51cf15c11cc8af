"""Argument checks; every error names the value and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

MAX_NUM_SPECULATIONS = 1024  # the cache has room for the drafts of a round beyond a sequence's end
STRATEGIES = ("self_speculative", "autoregressive", "early_exit")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def integer_in(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Check an int in [low, high]; no upper bound without ``high``."""
    number = _integer(name, value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in {low} … {high}'}, got {value}")
    return number


def real(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """Check a number in [low, high], or in (low, high]. NaN is in no range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not low <= number <= high or (open_low and number == low):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value}")
    return number


def exit_layer(value: Any, num_layers: int) -> int:
    """Check E in 1 … L - 1: some layers must draft, some must be left to verify."""
    if not 1 <= _integer("exit_layer", value) < num_layers:
        raise ValueError(f"exit_layer must be in 1 … {num_layers - 1} for a model of {num_layers} layers, got {value}")
    return int(value)


def exit_layer_of_exit(value: Any, exit_layer: int) -> int:
    """Check that the layer asked for is that of the trained exit, or left open."""
    if value not in (None, "auto", exit_layer):
        raise ValueError(
            f"exit_layer is {value!r}, but the exit that is given is after {exit_layer} layers; "
            "exit=None drafts with the model's own layers"
        )
    return exit_layer


def at_least_one(name: str, value: Any) -> int:
    return integer_in(name, value, 1)


def strategy(value: Any) -> str:
    if value not in STRATEGIES:
        raise ValueError(f"unknown strategy {value!r}, expected one of {', '.join(STRATEGIES)}")
    return str(value)


def exit_layer_or_auto(value: Any, num_layers: int) -> int | None:
    """Check an exit layer; None for "auto"."""
    return None if value == "auto" else exit_layer(value, num_layers)


def num_speculations_or_auto(value: Any, most: int) -> int | None:
    """Check K; None for "auto"."""
    return None if value == "auto" else integer_in("num_speculations", at_least_one("num_speculations", value), 1, most)


def prompt(input_ids: Any, vocab_size: int, device: torch.device) -> Tensor:
    """Check one prompt of at least one token and return it as int64 [1, N]."""
    if not isinstance(input_ids, Tensor):
        tokens = [_integer("a token of the prompt", token) for token in input_ids]
        _check_tokens(tokens, vocab_size)
        input_ids = torch.tensor(tokens, dtype=torch.int64, device=device)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids has dtype {str(input_ids.dtype).removeprefix('torch.')}, expected int64")
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"a prompt has shape {list(input_ids.shape)}, expected [N] or [1, N]")
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty; it needs at least one token (a BOS token, for instance)")
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device}, the model on {device}")
    _check_tokens([int(input_ids.min()), int(input_ids.max())], vocab_size)
    return input_ids.long()


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")


def prompts(input_ids: Any) -> list[Any]:
    """Split a tensor [B, N] or a list into prompts; `prompt` checks each."""
    if not isinstance(input_ids, (Tensor, list, tuple)):
        raise TypeError(f"input_ids must be a tensor [B, N] or a list of prompts, got {type(input_ids).__name__}")
    if isinstance(input_ids, Tensor) and input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}, expected [B, N]")
    rows = list(input_ids)
    if not rows:
        raise ValueError("input_ids holds no prompt")
    for row in rows:
        if not isinstance(row, (Tensor, list, tuple)):
            raise TypeError(f"a list of input_ids holds prompts, each a tensor [N] or a list of int, got {row!r}")
    return rows


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """Repeat ``value`` for every prompt, or check a list with one element for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts")
    return list(value)


def length(prompt_tokens: int, new_tokens: int, max_seq_len: int) -> int:
    """Return the length of the whole sequence; it must not exceed ``max_seq_len``."""
    total = prompt_tokens + new_tokens
    if total > max_seq_len:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={new_tokens} make {total}, "
            f"more than max_seq_len={max_seq_len}"
        )
    return total


def max_seq_len(value: Any, positions: int | None) -> int:
    """Return the caller's value, else the model's number of positions."""
    if value is None:
        if positions is None:
            raise ValueError("the model's config has no max_position_embeddings; give max_seq_len")
        return positions
    if positions is not None and at_least_one("max_seq_len", value) > positions:
        raise ValueError(
            f"max_seq_len {value} exceeds the {positions} positions that the model was made for, or that fit into its "
            "sliding window"
        )
    return at_least_one("max_seq_len", value)


def stop_tokens(value: Any, vocab_size: int) -> frozenset[int]:
    """Return the ids that end a sequence; none for None and an empty list."""
    if value is None:
        return frozenset()
    if isinstance(value, Tensor):
        value = value.reshape(-1).tolist()
    ids = [value] if isinstance(value, Integral) else list(value)
    for token in ids:
        if not 0 <= _integer("eos_token_id", token) < vocab_size:
            raise ValueError(f"eos_token_id {token} is outside the vocabulary of {vocab_size}")
    return frozenset(map(int, ids))
