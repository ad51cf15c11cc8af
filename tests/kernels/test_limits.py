"""Values at the limits of int64 and sizes that overflow: every op refuses them and writes nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk

from .common import PATHS, run, running_on
from .examples import SIZES, example

LARGEST = 2**63 - 1
EXTREMES = (-(2**63), 1 - 2**63, -(2**32), -1, 2**31 - 1, 2**31, 2**32, 2**62, LARGEST - 6, LARGEST - 1, LARGEST)
CACHED = ("rope_kv_append", "verify_attention", "partial_forward", "draft", "speculative_round")
GUARD = 64.0


@pytest.fixture(params=[*PATHS, "triton"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs on the CPU, with Triton's interpreter among them."""
    if request.param != "triton":
        with running_on(request.param):
            yield request.param
        return
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, TRITON_INTERPRET=1")
    with lk.use_backend("triton"):
        yield "triton"


def guarded(args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``args`` with each cache between two copies of its size that hold `GUARD`; and the whole buffers, by name."""
    buffers = {}
    for name in ("k_cache", "v_cache"):
        if name in args:
            cache = args[name]
            buffers[name] = torch.full((3, *cache.shape), GUARD, dtype=cache.dtype)
            buffers[name][1] = cache
            args = {**args, name: buffers[name][1]}
    return args, buffers


def assert_guards_kept(buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        assert (buffer[[0, 2]] == GUARD).all(), f"a write outside of {name}"


def huge(*shape: int) -> Tensor:
    """A contiguous fp32 tensor that claims a shape without the memory: a check must refuse it before any access."""
    strides = np.cumprod([1, *reversed(shape[1:])])[::-1].astype(np.int64) * 4
    return torch.from_numpy(np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, tuple(strides)))


@pytest.mark.parametrize("length", EXTREMES)
@pytest.mark.parametrize("op", CACHED)
def test_length_outside_the_cache_is_refused(path: str, op: str, length: int) -> None:
    args, buffers = guarded(example(op))
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for b in range(2):
        args["seq_lens"] = torch.tensor([3, 3])
        args["seq_lens"][b] = length
        with pytest.raises(ValueError, match=r"do not fit the cache's capacity|is outside the cache's"):
            run(op, **args)
        assert args["seq_lens"][b] == length
    for name, buffer in buffers.items():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("op", CACHED)
def test_last_length_that_fits_is_accepted(path: str, op: str) -> None:
    args, buffers = guarded(example(op))
    rows = SIZES["K"] + 1 if op in ("draft", "speculative_round") else SIZES["M"]
    args["seq_lens"] = torch.tensor([SIZES["T"] - rows, 0])
    run(op, **args)
    assert_guards_kept(buffers)
    args["seq_lens"] = torch.tensor([0, SIZES["T"] - rows + 1])
    with pytest.raises(ValueError, match="cache's"):
        run(op, **args)


@pytest.mark.parametrize("length", [-(2**63), -1, LARGEST - 1, LARGEST])
@pytest.mark.parametrize("op", ["accept_greedy", "accept_sampled"])
def test_length_that_cannot_advance_is_refused(path: str, op: str, length: int) -> None:
    args = {**example(op), "seq_lens": torch.tensor([0, length])}
    with pytest.raises(ValueError, match=r"do not fit the cache's capacity|is outside the cache's"):
        run(op, **args)
    assert args["seq_lens"].tolist() == [0, length]


def test_draft_without_a_vocabulary_is_refused(path: str) -> None:
    args = example("accept_sampled")
    args.update(draft_logits=torch.empty(2, SIZES["K"], 0), token_map=torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="draft_logits has no tokens"):
        run("accept_sampled", **args)


@pytest.mark.parametrize("outside", [SIZES["V"], 2**32, LARGEST])
def test_draft_token_outside_the_embedding_is_refused(path: str, outside: int) -> None:
    args = example("draft", options=True)
    args.update(token_map=torch.full_like(args["token_map"], outside), draft_threshold=0.0)
    with pytest.raises(ValueError, match=f"token {outside} is outside the vocabulary of {SIZES['V']}"):
        run("draft", **args)


@pytest.mark.parametrize("op", ["draft", "speculative_round"])
@pytest.mark.parametrize("batch", [0, 2])
def test_huge_num_speculations_is_refused(path: str, op: str, batch: int) -> None:
    args = {**example(op), "num_speculations": LARGEST}
    args.update({name: args[name][:batch] for name in ("token", "seq_lens")})
    args.update({name: args[name][:, :batch] for name in ("k_cache", "v_cache")})
    with pytest.raises(ValueError, match=f"num_speculations must be below {2**31 - 1}, got {LARGEST}"):
        run(op, **args)


def test_sizes_that_overflow_are_refused(isa: str) -> None:
    """Attention's partial results need 2^45 splits * 2^10 heads * 64 floats, which is 0 in 64 bits."""
    capacity = 2**53
    cache = huge(1, 1, capacity, 8)
    q = torch.zeros(1, 1, 2**10, 8)
    with pytest.raises(ValueError, match="does not fit the memory"):
        lk.verify_attention(q, cache, cache, torch.tensor([capacity - 1]))


def test_vocabulary_above_32_bits_is_refused(isa: str) -> None:
    rows = 2**62
    with pytest.raises(ValueError, match=f"head_weight has {rows} rows, expected at most"):
        lk.exit_head(torch.zeros(1, 0), torch.zeros(0), torch.empty(rows, 0), 1e-5)


def test_many_rows_without_columns_need_no_work(isa: str) -> None:
    rows = 2**40
    assert lk.linear(torch.empty(rows, 0), torch.empty(0, 0)).shape == (rows, 0)
    assert lk.swiglu(torch.empty(rows, 0), torch.empty(0, 0), torch.empty(0, 0)).shape == (rows, 0)


def mutated(op: str, draw: random.Random) -> dict[str, Any]:
    """Arguments of ``op`` with some integers replaced by extreme ones."""
    args = example(op, options=draw.random() < 0.5 and op != "accept_greedy" and op != "accept_sampled")
    chosen = [name for name, arg in args.items() if isinstance(arg, Tensor) and arg.dtype == torch.int64]
    for name in draw.sample(chosen, min(len(chosen), draw.choice((1, 1, 2)))):
        flat = args[name] = args[name].clone()
        index = draw.randrange(flat.numel())
        flat.view(-1)[index] = draw.choice((draw.choice(EXTREMES), draw.randint(-1, 8)))
    return args


@pytest.mark.parametrize("op", [*CACHED, "exit_head", "accept_greedy", "accept_sampled"])
def test_random_integers_end_in_an_error_or_a_result(path: str, op: str) -> None:
    """Any int64 in lengths, slots, tokens, maps and seeds: a ValueError, or a result, and nothing outside a cache."""
    draw = random.Random(op)
    results = {"error": 0, "result": 0}
    for _ in range(1 if path == "triton" else 20):  # its interpreter is slow
        args, buffers = guarded(mutated(op, draw))
        try:
            run(op, **args)
            results["result"] += 1
        except ValueError:
            results["error"] += 1
        assert_guards_kept(buffers)
    assert op == "exit_head" or path == "triton" or min(results.values()) > 0
