"""The prompts of a call, from whatever a caller has them in, how each is decoded, and what pads the result."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import validation
from .sampling import params_of_each
from .text import stop_rules


def prompts_of(input_ids: Any, attention_mask: Any = None, tokenizer: Any = None) -> list[Any]:
    """The prompts of ``SelfSpeculativeDecoder.generate``, without padding.

    Parameters
    ----------
    input_ids : Tensor [B, N] or [N], str, or sequence of str, of prompts, or of int
    attention_mask : Tensor or nested sequence, optional
        Of the shape of ``input_ids``, 0 for padding, on the left or on the right of each prompt.
    tokenizer : callable, optional
        Reads strings.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """
    if isinstance(input_ids, str):
        input_ids = [input_ids]
    if isinstance(input_ids, (list, tuple)) and any(isinstance(one, str) for one in input_ids):
        if attention_mask is not None:
            raise ValueError("attention_mask goes with token ids; the prompts are strings")
        return [text_ids(one, tokenizer) for one in input_ids]
    if _is_one(input_ids):
        input_ids, attention_mask = [input_ids], None if attention_mask is None else [attention_mask]
    rows = validation.prompts(input_ids)
    return rows if attention_mask is None else _without_padding(rows, attention_mask)


def text_ids(text: Any, tokenizer: Any) -> list[int]:
    """The tokens of a string."""
    if not isinstance(text, str):
        raise TypeError(f"prompts are all strings or all token ids, got a string and {text!r}")
    if tokenizer is None:
        raise ValueError("a prompt that is a string needs a tokenizer: give tokenizer=, or set decoder.tokenizer")
    return tokenizer(text).input_ids


def requests_of(
    prompts: Sequence[Any], sampling: Any, logits_processor: Any, should_stop: Any, stop_strings: Any, tokenizer: Any
) -> list[dict[str, Any]]:
    """What `Session.add` is told of each prompt alone, by its names; the arguments are those of ``generate``.

    Raises
    ------
    ValueError, TypeError
        If there are not as many of something as prompts; or with the offending value.
    """
    count = len(prompts)
    rules = validation.one_each("should_stop", should_stop, count)
    if stop_strings is not None:
        rules = stop_rules(tokenizer, stop_strings, prompts, rules)
    processors = validation.one_each("logits_processor", logits_processor, count)
    each = zip(prompts, params_of_each(sampling, count), processors, rules, strict=True)
    names = ("prompt", "sampling", "logits_processor", "should_stop")
    return [dict(zip(names, values, strict=True)) for values in each]


def longest(prompts: Sequence[Any]) -> int:
    """The tokens of the longest of some prompts."""
    return max(len(one) if isinstance(one, (list, tuple)) else one.numel() for one in prompts)


def padding(given: int | None, of_model: int | None, stops: int | Sequence[int] | None, vocab_size: int) -> int:
    """The token that pads the rows of a result: as given, else the model's, else one that ends texts."""
    if given is not None:
        return validation.integer_in("pad_token_id", given, 0, vocab_size - 1)
    return min(validation.stop_tokens(stops, vocab_size), default=0) if of_model is None else of_model


def _is_one(input_ids: Any) -> bool:
    """Whether this is one prompt and not a batch."""
    if isinstance(input_ids, Tensor):
        return input_ids.dim() == 1
    return isinstance(input_ids, (list, tuple)) and bool(input_ids) and isinstance(input_ids[0], Integral)


def _without_padding(rows: list[Any], attention_mask: Any) -> list[Any]:
    if len(attention_mask) != len(rows):
        raise ValueError(f"attention_mask has {len(attention_mask)} rows for {len(rows)} prompts")
    return [_unmasked(number, *both) for number, both in enumerate(zip(rows, attention_mask, strict=True))]


def _unmasked(number: int, row: Any, mask: Any) -> Any:
    """The part of a prompt that its mask leaves."""
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
