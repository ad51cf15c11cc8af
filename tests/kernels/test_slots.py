"""Cache slots: a sequence may use any row of a larger cache, and that changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .common import DTYPES, assert_same_bits, run
from .examples import SIZES, example

OPS = ("rope_kv_append", "verify_attention", "partial_forward", "draft", "speculative_round")
CACHES = ("k_cache", "v_cache")
PER_SEQUENCE = ("q", "k", "v", "hidden", "token", "seq_lens", "slots")
ROWS = 5


def rows_of(cache: Tensor) -> int:
    """The dimension of a cache, with or without layers, that holds its rows."""
    return cache.dim() - 4


def in_slots(args: dict[str, Any], slots: Tensor) -> dict[str, Any]:
    """The same call over caches of five rows, NaN where no sequence is."""
    moved = {**args, "slots": slots}
    for name in CACHES:
        cache = args[name]
        shape = list(cache.shape)
        shape[rows_of(cache)] = ROWS
        moved[name] = torch.full(shape, float("nan"), dtype=cache.dtype)
        moved[name].index_copy_(rows_of(cache), slots, cache)
    return {name: arg.clone() if name == "seq_lens" else arg for name, arg in moved.items()}


def call(op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    out = getattr(torch.ops.layerskip, op)(**args)
    return (out,) if isinstance(out, Tensor) else tuple(out)


def expect_same(args: dict[str, Any], moved: dict[str, Any], slots: Tensor) -> None:
    """What was written is the same, and nothing else was."""
    others = torch.tensor([row for row in range(ROWS) if row not in slots.tolist()])
    for name in CACHES:
        assert_same_bits(moved[name].index_select(rows_of(args[name]), slots), args[name])
        assert moved[name].index_select(rows_of(args[name]), others).isnan().all()
    assert_same_bits(moved["seq_lens"], args["seq_lens"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(3, 0), (1, 4), (0, 1)])
@pytest.mark.parametrize("op", OPS)
def test_slots_change_no_bit(path: str, op: str, order: tuple[int, int], dtype: torch.dtype) -> None:
    args, slots = example(op, dtype), torch.tensor(order)
    moved = in_slots(args, slots)
    assert_same_bits(call(op, moved), call(op, args))
    expect_same(args, moved, slots)


@pytest.mark.parametrize("op", OPS)
def test_sequence_alone_gives_what_the_batch_gives(isa: str, op: str) -> None:
    args, slots = example(op, torch.bfloat16), torch.tensor([4, 2])
    moved = in_slots(args, slots)
    together = call(op, args)
    for b in range(SIZES["B"]):
        own = {name: arg[b : b + 1].clone() if name in PER_SEQUENCE else arg for name, arg in moved.items()}
        assert_same_bits(call(op, own), tuple(out[b : b + 1] for out in together))
        assert_same_bits(own["seq_lens"], args["seq_lens"][b : b + 1])
    expect_same(args, {**moved, "seq_lens": args["seq_lens"]}, slots)


@pytest.mark.parametrize("slots", [(2, 2), (0, 5), (-1, 0)])
@pytest.mark.parametrize("op", OPS)
def test_invalid_slots(path: str, op: str, slots: tuple[int, int]) -> None:
    moved = in_slots(example(op), torch.tensor([0, 1]))
    names = [argument.name for argument in getattr(torch.ops.layerskip, op).default._schema.arguments]
    moved["slots"] = torch.tensor(slots)
    args = [moved[name] for name in names[: names.index("slots")] if name in moved]
    with pytest.raises(ValueError, match=r"slots"):
        run(op, *args, slots=moved["slots"])


@pytest.mark.parametrize("op", OPS)
def test_equal_slots_of_sequences_far_apart_are_refused(path: str, op: str) -> None:
    moved = in_slots(example(op), torch.tensor([0, 1]))
    args = {name: arg[[0, 1, 0]] if name in PER_SEQUENCE else arg for name, arg in moved.items()}
    with pytest.raises(ValueError, match=r"slots"):
        run(op, **{**args, "slots": torch.tensor([4, 1, 4])})
