"""Argument checks; every error names the value and what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_NUM_SPECULATIONS = 1024  # the cache has room for the drafts of a round beyond a sequence's end
STRATEGIES = ("self_speculative", "autoregressive", "early_exit")


def integer(name: str, value: Any) -> int:
    """Check an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def integer_in(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Check an int in [low, high]; no upper bound without ``high``."""
    number = integer(name, value)
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
    if not 1 <= integer("exit_layer", value) < num_layers:
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
    """Check K, at most the session's limit ``most``; None for "auto"."""
    if value == "auto":
        return None
    number = at_least_one("num_speculations", value)
    if number > most:
        limit = "" if most == MAX_NUM_SPECULATIONS else "; the session was opened with this limit, num_speculations="
        raise ValueError(f"num_speculations must be in 1 … {most}, got {value}{limit and limit + str(most)}")
    return number


def prompts(
    given: Any,
    vocab_size: int,
    device: torch.device,
    tokenizer: Any = None,
    attention_mask: Any = None,
    special_tokens: bool = True,
) -> list[Tensor]:
    """Check prompts of any kind and return each as int64 [1, N], without padding.

    Parameters
    ----------
    given : Tensor, numpy array, BatchEncoding, str, or sequence
        Tokens [N] of one prompt, [B, N] of several, a text, or a sequence of such prompts; or what a tokenizer returns.
    vocab_size : int
    device : torch.device
        Tensors must be on it.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Encodes texts.
    attention_mask : Tensor [B, N] or sequence, optional
        0 for padding.
    special_tokens : bool
        Whether texts get the tokenizer's special tokens.
    """
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"a tokenizer's output has input_ids, got only {', '.join(map(str, given)) or 'nothing'}")
        if attention_mask is not None:
            raise ValueError("give the attention_mask alone or with the tokenizer's output, not both")
        given, attention_mask = given["input_ids"], given.get("attention_mask")
    if isinstance(given, str):
        given = [given]
    if _is_sequence(given) and any(isinstance(one, str) for one in given):
        if attention_mask is not None:
            raise ValueError("attention_mask goes with token ids; the prompts are strings")
        given = [_encode(one, tokenizer, special_tokens) for one in given]
    if isinstance(given, (Tensor, np.ndarray)):
        single = given.ndim == 1
        if given.ndim not in (1, 2):
            raise ValueError(f"input_ids has shape {list(given.shape)}, expected [N] or [B, N]")
    elif _is_sequence(given):
        single = len(given) > 0 and isinstance(given[0], Integral)
    else:
        raise TypeError(
            "a prompt must be a str, a tensor, an array, a list of int or a tokenizer's output, or prompts a list of "
            f"these, got {type(given).__name__}"
        )
    if single:
        given, attention_mask = [given], None if attention_mask is None else [attention_mask]
    rows = list(given)
    if not rows:
        raise ValueError(_EMPTY)
    for row in rows:
        if not isinstance(row, (Tensor, np.ndarray)) and not _is_sequence(row):
            raise TypeError(f"a list of input_ids holds prompts, each a tensor [N] or a list of int, got {row!r}")
    if attention_mask is not None:
        if len(attention_mask) != len(rows):
            raise ValueError(f"attention_mask has {len(attention_mask)} rows for {len(rows)} prompts")
        rows = [_unmasked(number, *both) for number, both in enumerate(zip(rows, attention_mask, strict=True))]
    return [_tokens(row, vocab_size, device) for row in rows]


def prompt(
    given: Any, vocab_size: int, device: torch.device, tokenizer: Any = None, special_tokens: bool = True
) -> Tensor:
    """Check one prompt, of any kind that `prompts` takes, and return it as int64 [1, N]."""
    rows = prompts(given, vocab_size, device, tokenizer, special_tokens=special_tokens)
    if len(rows) != 1:
        raise ValueError(f"one prompt is taken here, got {len(rows)}")
    return rows[0]


_EMPTY = "the prompt is empty; it needs at least one token (a BOS token, for instance)"


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _encode(text: Any, tokenizer: Any, special_tokens: bool) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"prompts are all strings or all token ids, got a string and {text!r}")
    if tokenizer is None:
        raise ValueError("a prompt that is a string needs a tokenizer: set decoder.tokenizer, or give tokenizer=")
    tokens: list[int] = tokenizer(text, add_special_tokens=special_tokens).input_ids
    return tokens


def _unmasked(number: int, row: Any, mask: Any) -> Any:
    """Remove the padding around a prompt."""
    mask = torch.as_tensor(mask)
    if mask.dim() != 1 or len(mask) != len(row):
        raise ValueError(f"attention_mask has shape {list(mask.shape)} for prompt {number}, of {len(row)} tokens")
    kept = mask.ne(0).nonzero().flatten().tolist()
    if not kept:
        raise ValueError(f"attention_mask hides all of prompt {number}")
    if kept[-1] - kept[0] + 1 != len(kept):
        hole = next(place for place in range(kept[0], kept[-1]) if not mask[place])
        raise ValueError(
            f"attention_mask has a hole at position {hole} of prompt {number}; it may hide padding before or after a "
            "prompt, but nothing inside it"
        )
    return row[kept[0] : kept[-1] + 1]


def _tokens(row: Any, vocab_size: int, device: torch.device) -> Tensor:
    """Return the tokens of one prompt as int64 [1, N]."""
    if isinstance(row, np.ndarray):
        if not np.issubdtype(row.dtype, np.integer):
            raise TypeError(f"input_ids has dtype {row.dtype}, expected int64")
        row = torch.from_numpy(row.astype(np.int64)).to(device)
    elif not isinstance(row, Tensor):
        tokens = [integer("a token of the prompt", token) for token in row]
        _check_tokens(tokens, vocab_size)
        row = torch.tensor(tokens, dtype=torch.int64, device=device)
    if row.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids has dtype {str(row.dtype).removeprefix('torch.')}, expected int64")
    if row.dim() == 1:
        row = row[None]
    if row.dim() != 2 or row.shape[0] != 1:
        raise ValueError(f"a prompt has shape {list(row.shape)}, expected [N] or [1, N]")
    if row.shape[1] == 0:
        raise ValueError(_EMPTY)
    if row.device != device:
        raise ValueError(f"input_ids is on {row.device}, the model on {device}")
    _check_tokens(torch.stack(row.aminmax()).tolist(), vocab_size)
    return row.long()


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """Repeat ``value`` for every prompt, or check a list with one element for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts")
    return list(value)


def length(prompt_tokens: int, max_new_tokens: Any, max_seq_len: int) -> int:
    """Return the largest length of the whole sequence; None for ``max_new_tokens`` goes up to ``max_seq_len``."""
    if max_new_tokens is None:
        if prompt_tokens >= max_seq_len:
            raise ValueError(
                f"a prompt of {prompt_tokens} tokens leaves no room for new ones in max_seq_len={max_seq_len}"
            )
        return max_seq_len
    total = prompt_tokens + at_least_one("max_new_tokens", max_new_tokens)
    if total > max_seq_len:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and max_new_tokens={max_new_tokens} make {total}, "
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
        if not 0 <= integer("eos_token_id", token) < vocab_size:
            raise ValueError(f"eos_token_id {token} is outside the vocabulary of {vocab_size}")
    return frozenset(map(int, ids))
