"""exit_head against the reference: ties, rows that are not finite, a token map, an int8 head."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, agrees, close, normal, on_backend, same_bits

import layerskip_kernels as lk
from tests.kernels.common import MANY_ROWS

# The reference rounds the normed row like the kernel, so only sums in fp32 differ. In the interpreter a bf16 rounding
# may fall on the neighbour, and a logit is a sum of D such products: 2^-8 · sqrt(D) · |logit| / sqrt(D), with room.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 0.05}


def arguments(rows: int, depth: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> tuple:
    hidden = normal(0, rows, depth, dtype=dtype, device=device, by=3.0)
    head = normal(2, vocab_size, depth, dtype=dtype, device=device, by=depth**-0.5)
    return hidden, normal(1, depth, dtype=dtype, device=device), head, 1e-5


def exit_agrees(*args: Any) -> lk.ExitOutput:
    """In fp32 and fp16 the tokens are equal; in bf16 the chosen one's true logit is the best within the tolerance."""
    if args[0].dtype != torch.bfloat16:
        return agrees(lk.exit_head, *args, tolerances=TOLERANCES)
    hidden, norm, head, eps, token_map, scale = (*args, None, None)[:6]
    (out, _), (truth, _) = (on_backend(backend, lk.exit_head, *args) for backend in ("triton", "reference"))
    row = out.token if token_map is None else (token_map[None] == out.token[:, None]).int().argmax(1)
    normed, _ = on_backend("reference", lk.rms_norm, hidden, norm, eps)
    chosen = (normed.float() * head[row].float()).sum(1) * (1 if scale is None else scale[row])
    for actual, expected in ((chosen, truth.logit), (out.logit, truth.logit), (out.logsumexp, truth.logsumexp)):
        close(actual, expected, TOLERANCES[torch.bfloat16])
    return out


def int8_head(head: Tensor) -> tuple[Tensor, Tensor]:
    scale = head.float().abs().amax(1) / 127
    return (head.float() / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "depth", "vocab_size"),
    [(1, 41, 1), (7, 256, 1000), (16, 72, 64), (35, 100, 333), *((rows, 40, 70) for rows in MANY_ROWS)],
)
def test_exit_head(rows: int, depth: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    exit_agrees(*arguments(rows, depth, vocab_size, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapped", [False, True])
def test_exit_head_with_an_int8_head(mapped: bool, dtype: torch.dtype, device: torch.device) -> None:
    hidden, norm, head, eps = arguments(7, 136, 300, dtype, device)
    quantized, scale = int8_head(head)
    token_map = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:300].to(device) if mapped else None
    out = exit_agrees(hidden, norm, quantized, eps, token_map, scale)
    assert not mapped or torch.isin(out.token, token_map).all()


def test_exit_head_over_many_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than the second stage takes at a time."""
    monkeypatch.setattr(import_module("layerskip_kernels.triton.exit_head"), "FINISH_BLOCK", 4)
    agrees(lk.exit_head, *arguments(2, 16, 700, torch.float32, device), tolerances=TOLERANCES)


def test_a_tie_goes_to_the_lowest_row(device: torch.device) -> None:
    """Not against the reference: its product gives equal head rows unequal logits."""
    hidden, norm, head, eps = arguments(5, 32, 100, torch.float32, device)
    for repeated, bound in ((head.repeat(4, 1), 100), (head[:1].repeat(150, 1), 1)):
        out, _ = on_backend("triton", lk.exit_head, hidden, norm, repeated, eps)
        assert int(out.token.max()) < bound


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_row_that_is_not_finite_names_no_token(value: float, mapped: bool, device: torch.device) -> None:
    hidden, norm, head, eps = arguments(4, 32, 200, torch.float32, device)
    hidden[2, 5] = value
    token_map = torch.arange(1000, 1200, device=device) if mapped else None
    out = agrees(lk.exit_head, hidden, norm, head, eps, token_map, tolerances=TOLERANCES)
    assert out.token[2] == -1
    assert (out.token[[0, 1, 3]] >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_names_no_token(value: float, device: torch.device) -> None:
    hidden, norm, head, eps = arguments(3, 32, 200, torch.float32, device)
    head[150, 3] = value
    out, _ = on_backend("triton", lk.exit_head, hidden, norm, head, eps)
    truth, _ = on_backend("reference", lk.exit_head, hidden, norm, head, eps)
    assert torch.equal(out.token, truth.token)


def test_a_head_row_of_minus_infinity_is_never_chosen(device: torch.device) -> None:
    hidden, norm, head, eps = arguments(3, 32, 200, torch.float32, device)
    hidden, norm = hidden.abs(), norm.abs()
    head[64:130] = float("-inf")  # one whole tile among them
    out = agrees(lk.exit_head, hidden, norm, head, eps, tolerances=TOLERANCES)
    assert (out.token >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_row_does_not_depend_on_the_batch(quantized: bool, dtype: torch.dtype, device: torch.device) -> None:
    hidden, norm, head, eps = arguments(35, 136, 500, dtype, device)
    head, scale = int8_head(head) if quantized else (head, None)
    with lk.use_backend("triton"):
        together = lk.exit_head(hidden, norm, head, eps, None, scale)
        for span in (slice(0, 1), slice(3, 10), slice(15, 33), slice(34, 35)):
            for part, whole in zip(lk.exit_head(hidden[span], norm, head, eps, None, scale), together, strict=True):
                same_bits(part, whole[span])


def draws(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures, greedy rows among them; seeds and offsets that take more than 32 bits."""
    temperature = torch.tensor([0.0, 1.0, 0.6, 2.0, 0.0])[torch.arange(rows) % 5]
    seed = torch.tensor([1, 2**62 + 5, -3, 2**31, 0])[torch.arange(rows) % 5]
    offset = torch.arange(rows) * 1001 + (torch.arange(rows) % 2) * 2**33
    return temperature.to(device), seed.to(device), offset.to(device)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("drafting", [False, True])
def test_sampling(drafting: bool, dtype: torch.dtype, device: torch.device) -> None:
    """The same tokens as the reference draws, through the same noise; with a draft's head, too."""
    hidden, norm, head, eps = arguments(18, 41, 150, dtype, device)
    token_map = scale = None
    if drafting:
        head, scale = int8_head(head)
        token_map = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:150].to(device)
    logits = torch.empty(18, 150, device=device)
    args = (hidden, norm, head, eps, token_map, scale, *draws(18, device), logits)
    (ours, ours_args), (truth, true_args) = (on_backend(one, lk.exit_head, *args) for one in ("triton", "reference"))
    assert torch.equal(ours.token, truth.token)
    for mine, true in zip((*ours[1:], ours_args[-1]), (*truth[1:], true_args[-1]), strict=True):
        close(mine, true, TOLERANCES[dtype])
    with lk.use_backend("triton"):
        greedy = lk.exit_head(hidden, norm, head, eps, token_map, scale)
    for mine, true in zip(ours[:2], greedy[:2], strict=True):
        same_bits(mine[::5], true[::5])  # temperature 0


def test_noise_matches_the_reference(device: torch.device) -> None:
    """Over a head that says nothing the noise decides alone."""
    rows, vocab_size = 64, 200
    hidden, norm, head, eps = arguments(rows, 8, vocab_size, torch.float32, device)
    generator = torch.Generator().manual_seed(1)
    seed, offset = (torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(device) for _ in range(2))
    args = (hidden, norm, head * 0, eps, None, None, torch.ones(rows, device=device), seed, offset.abs())
    agrees(lk.exit_head, *args, tolerances=TOLERANCES)


@pytest.mark.slow
def test_samples_follow_the_probabilities(device: torch.device) -> None:
    """Chi-square over 1600 positions, 4 degrees of freedom; 18.5 is exceeded once in a thousand seeds."""
    rows, temperature = 1600, 1.5
    hidden, norm, head, eps = arguments(1, 8, 5, torch.float32, device)
    given = (torch.full((rows,), temperature, device=device), torch.full((rows,), 7, device=device))
    with lk.use_backend("triton"):
        offset = torch.arange(rows, device=device)
        token = lk.exit_head(hidden.expand(rows, -1), norm, head, eps, None, None, *given, offset).token
    with lk.use_backend("reference"):
        expected = ((lk.rms_norm(hidden, norm, eps) @ head.T) / temperature).softmax(-1)[0] * rows
    counts = token.bincount(minlength=5)
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5


def test_sample_and_logits_of_a_row_do_not_depend_on_the_batch(device: torch.device) -> None:
    hidden, norm, head, eps = arguments(19, 72, 150, torch.float16, device)
    drawn = draws(19, device)
    apart = torch.empty(19, 3, 150, device=device)[:, 1]  # rows that lie apart
    with lk.use_backend("triton"):
        together = lk.exit_head(hidden, norm, head, eps, None, None, *drawn, apart)
        for span in (slice(0, 1), slice(3, 10), slice(15, 19)):
            logits = torch.empty(span.stop - span.start, 150, device=device)
            part = lk.exit_head(hidden[span], norm, head, eps, None, None, *(one[span] for one in drawn), logits)
            for mine, whole in zip((*part, logits), (*together, apart), strict=True):
                same_bits(mine, whole[span])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sampled_row_that_is_not_finite_names_no_token(value: float, device: torch.device) -> None:
    hidden, norm, head, eps = arguments(5, 32, 100, torch.float32, device)
    hidden[1, 5] = value
    out, _ = on_backend("triton", lk.exit_head, hidden, norm, head, eps, None, None, *draws(5, device))
    assert out.token[1] == -1
    assert (out.token[[0, 2, 3, 4]] >= 0).all()


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_invalid_temperatures(value: float, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU looking would be a host sync")
    hidden, norm, head, eps = arguments(5, 32, 100, torch.float32, device)
    temperature, *named = draws(5, device)
    temperature[3] = value
    with lk.use_backend("triton"), pytest.raises(ValueError, match=r"temperature\[3\] is .*, expected a finite number"):
        lk.exit_head(hidden, norm, head, eps, None, None, temperature, *named)
