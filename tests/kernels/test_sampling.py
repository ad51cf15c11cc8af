"""`exit_head` at a temperature, and the logits it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels import _noise

from .common import (
    DTYPES,
    PATHS,
    Inputs,
    assert_as_good_as,
    assert_rows_alone,
    assert_same_bits,
    assert_threads_agree,
    chi_square_p,
    double,
    running_on,
)

EPS = 1e-5
SHAPES = [(1, 1, 1), (7, 9, 41), (9, 41, 7), (0, 16, 8), (5, 64, 2048), (3, 40, 5003)]  # R, D, V


def head_of(dtype: torch.dtype, rows: int, width: int, vocab_size: int, kind: str) -> list[Any]:
    """The greedy arguments; an int8 head comes with a token map."""
    make = Inputs(dtype, seed=vocab_size)
    if kind == "full":
        return [make.normal(rows, width), make.norm(width), make.weight(vocab_size, width), EPS, None, None]
    scale = torch.full((vocab_size,), width**-0.5 / 64)
    weight = make.integers(-127, 128, vocab_size, width).to(torch.int8)
    tokens = torch.randperm(vocab_size, generator=make.generator)
    return [make.normal(rows, width), make.norm(width), weight, EPS, tokens, scale]


def draws_of(rows: int, cold: bool = False) -> list[Tensor]:
    """Temperature, seed, offset; with ``cold`` every third row is greedy."""
    make = Inputs(torch.float32, seed=rows)
    temperature = 0.3 + 1.5 * torch.rand(rows, generator=make.generator)
    if cold:
        temperature[::3] = 0
    return [temperature, make.integers(-(2**62), 2**62, rows), make.integers(0, 2**34, rows)]


@pytest.mark.parametrize("kind", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_gumbel_maximum_of_the_written_logits(
    path: str, shape: tuple[int, int, int], dtype: torch.dtype, kind: str
) -> None:
    """Against float64, from the op's own logits: the token up to near-ties, its logit and log-sum-exp of logits / T."""
    rows, _, vocab_size = shape
    args, draws = head_of(dtype, *shape, kind), draws_of(rows, cold=True)
    logits = torch.empty(rows, vocab_size)
    out = lk.exit_head(*args, *draws, logits)
    temperature, seed, offset = draws
    tokens = torch.arange(vocab_size) if args[4] is None else args[4]
    noise = _noise.gumbel(seed[:, None], offset[:, None], tokens, _noise.DRAW).double()
    scaled = logits.double() / torch.where(temperature > 0, temperature, 1.0)[:, None].double()
    noisy = torch.where(temperature[:, None] > 0, scaled + noise, scaled)
    matches = (out.token[:, None] == tokens).nonzero()
    assert matches[:, 0].tolist() == list(range(rows))
    chosen = matches[:, 1][:, None]
    torch.testing.assert_close(noisy.gather(1, chosen)[:, 0], noisy.amax(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out.logit.double(), scaled.gather(1, chosen)[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.logsumexp.double(), scaled.logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_every_instruction_set_draws_what_the_reference_draws(isa: str, kind: str) -> None:
    """In fp32 the logits agree to a few spacings, so of these rows no draw is near enough to a tie to differ."""
    args, draws = head_of(torch.float32, 200, 16, 1003, kind), draws_of(200, cold=True)
    ours = lk.exit_head(*args, *draws)
    with running_on("reference"):
        expected = lk.exit_head(*args, *draws)
    assert torch.equal(ours.token, expected.token)
    torch.testing.assert_close(tuple(ours[1:]), tuple(expected[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_written_logits(path: str, dtype: torch.dtype, kind: str) -> None:
    """As good as torch's; rows apart in memory; and asking for them changes nothing else."""
    args = head_of(dtype, 6, 41, 203, kind)
    wide = torch.full((6, 2, 210), float("nan"))
    out = lk.exit_head(*args, None, None, None, wide[:, 1, 3:206])
    assert_same_bits(tuple(out), tuple(lk.exit_head(*args)))
    assert wide[:, 0].isnan().all()
    assert wide[:, 1, :3].isnan().all()
    assert wide[:, 1, 206:].isnan().all()
    truth, eager = torch.empty(6, 203, dtype=torch.float64), torch.empty(6, 203)
    lk.reference.exit_head_ref(*double(args), None, None, None, truth)
    lk.reference.exit_head_ref(*args, None, None, None, eager)
    assert_as_good_as(wide[:, 1, 3:206].contiguous(), eager, truth, dtype)
    assert_same_bits(wide[:, 1, 3:206].amax(1), out.logit)


def test_zero_temperature_is_greedy(path: str) -> None:
    args, draws = head_of(torch.bfloat16, 9, 64, 513, "full"), draws_of(9, cold=True)
    plain, mixed = lk.exit_head(*args), lk.exit_head(*args, *draws)
    cold = draws[0] == 0
    assert cold.any()
    assert not cold.all()
    assert_same_bits([one[cold] for one in mixed], [one[cold] for one in plain])
    assert not torch.equal(mixed.token[~cold], plain.token[~cold])


@pytest.mark.parametrize("kind", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(isa: str, dtype: torch.dtype, kind: str) -> None:
    hidden, *rest = head_of(dtype, 17, 64, 513, kind)

    def op(hidden: Tensor, *draws: Tensor) -> tuple[Tensor, ...]:
        logits = torch.empty(hidden.shape[0], 513)
        return (*lk.exit_head(hidden, *rest, *draws, logits), logits)

    assert_rows_alone(op, hidden, *draws_of(17, cold=True))
    assert_threads_agree(lambda: op(hidden, *draws_of(17, cold=True)))


def test_the_draw_follows_seed_position_and_token_alone(path: str) -> None:
    """A permuted head draws the same tokens; another seed or position does not."""
    args, (temperature, seed, offset) = head_of(torch.float32, 400, 16, 97, "full"), draws_of(400)
    token = lk.exit_head(*args, temperature, seed, offset).token
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    permuted = [*args[:2], args[2][order], EPS, order, None]
    assert torch.equal(lk.exit_head(*permuted, temperature, seed, offset).token, token)
    for other in ((seed + 1, offset), (seed + 2**32, offset), (seed, offset + 1), (seed, offset + 2**32)):
        assert (lk.exit_head(*args, temperature, *other).token == token).float().mean() < 0.9


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_draws_have_the_distribution_of_softmax(path: str, subset: bool) -> None:
    """Seeds 0, 1, 2 …, one row each: chi-square of the tokens; a distribution at another temperature is told apart."""
    rows, vocab_size, temperature = 100_000, 11, 0.8
    make = Inputs(torch.float32, seed=5)
    hidden, head = make.normal(1, 8).expand(rows, 8), make.weight(vocab_size, 8)
    tokens = torch.arange(vocab_size).flip(0) + 3 if subset else None
    draws = torch.full((rows,), temperature), torch.arange(rows), torch.full((rows,), 12)
    logits = torch.empty(rows, vocab_size)
    with running_on(path):
        found = lk.exit_head(hidden, torch.ones(8), head, EPS, tokens, None, *draws, logits).token
    if tokens is not None:
        found = 13 - found
    assert chi_square_p(found, (logits[0].double() / temperature).softmax(0)) > 1e-4
    assert chi_square_p(found, (logits[0].double() / (temperature + 0.05)).softmax(0)) < 1e-6


def test_masked_tokens_are_never_drawn(path: str) -> None:
    head = Inputs(torch.float32).normal(700, 8)
    head[:300] = head[302:650] = float("-inf")
    rows = 500
    draws = torch.full((rows,), 5.0), torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    token = lk.exit_head(torch.ones(rows, 8), torch.ones(8), head, 0.0, None, None, *draws).token
    assert ((token >= 650) | ((token >= 300) & (token < 302))).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_draw_nothing(path: str, wrong: float) -> None:
    hidden = Inputs(torch.float32).normal(4, 8)
    hidden[1, 3] = wrong
    head = torch.ones(41, 8)
    out = lk.exit_head(hidden, torch.ones(8), head, EPS, None, None, *draws_of(4))
    assert (out.token == -1).tolist() == [False, True, False, False]
    out = lk.exit_head(hidden[2:], torch.ones(8), torch.full((41, 8), float("nan")), EPS, None, None, *draws_of(2))
    assert out.token.tolist() == [-1, -1]
    assert (out.logit - out.logsumexp).exp().isnan().all()


@pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("inf")])
def test_invalid_temperatures(path: str, wrong: float) -> None:
    args, (temperature, seed, offset) = head_of(torch.float32, 3, 8, 5, "full"), draws_of(3)
    temperature[1] = wrong
    with pytest.raises(ValueError, match=r"temperature\[1\] is (-0\.5|nan|inf), expected a finite number"):
        lk.exit_head(*args, temperature, seed, offset)
