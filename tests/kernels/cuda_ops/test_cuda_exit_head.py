"""exit_head on CUDA: against float64, bit for bit whatever travels along, ties, broken logits, samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerskip_kernels.reference import exit_head_ref

from ..common import DTYPES, MANY_ROWS, Inputs, assert_as_good_as, assert_same_bits, double
from ..test_exit_head import HEADS, arguments, eager, one_hot
from .runners import Emulated, Ops

# R, D, V: one of everything; unaligned rows; a tail of everything; two passes; segments of 256 bytes filled exactly;
# many rows, of which a pass takes 64 or, in fp32, 16
SHAPES = [
    (1, 1, 1),
    (7, 41, 203),
    (9, 72, 530),
    (17, 40, 100),
    (2, 256, 64),
    (0, 16, 8),
    *((rows, 9, 21) for rows in MANY_ROWS),
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(ops: Ops, shape: tuple[int, int, int], dtype: torch.dtype, head: str) -> None:
    args = arguments(dtype, *shape, head)
    _, logit, logsumexp = exit_head_ref(*double(args))
    out = ops.exit_head(*args)
    same = eager(args)
    assert_as_good_as(out.logit, same[0], logit, dtype)
    assert_as_good_as(out.logsumexp, same[1], logsumexp, dtype)
    # The token is the one that the logits written along have, and they are the reference's.
    logits = torch.full((shape[0], shape[2]), float("nan"))
    written = ops.exit_head(*args, None, None, None, logits)
    assert_same_bits(written, out)
    truth = torch.empty_like(logits, dtype=torch.float64)
    exit_head_ref(*double(args), None, None, None, truth)
    assert_as_good_as(logits, eager_logits(args), truth, dtype)
    tokens = torch.arange(shape[2]) if args[4] is None else args[4]
    assert out.token.tolist() == tokens[logits.argmax(-1)].tolist()
    assert_same_bits(out.logit, logits.amax(-1))


def test_more_tiles_than_the_merge_takes_at_once(ops: Ops) -> None:
    """Four for each of 512 threads, as real vocabularies have; each of the five parts has a largest logit."""
    vocab_size, part = 16 * 2048 + 40, 16 * 512
    hidden, norm, weight, eps, *_ = arguments(torch.float32, 5, 8, vocab_size, "full")
    wanted = [row * part + 17 for row in range(5)]
    weight[wanted] = 9 * torch.nn.functional.rms_norm(hidden, (8,), norm, eps)
    out, truth = ops.exit_head(hidden, norm, weight, eps), exit_head_ref(*double([hidden, norm, weight, eps]))
    assert out.token.tolist() == truth[0].tolist() == wanted
    torch.testing.assert_close(out.logsumexp.double(), truth[2], rtol=1e-5, atol=1e-5)
    flat = ops.exit_head(torch.zeros_like(hidden), norm, weight, eps)  # in which every row counts alike
    torch.testing.assert_close(flat.logsumexp, torch.full((5,), float(vocab_size)).log())


def eager_logits(args: list[Tensor | float | None]) -> Tensor:
    hidden, norm, weight, eps, _, scale = args
    normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], norm, eps)
    out = normed.float() @ weight.float().T
    return out if scale is None else out * scale


@pytest.mark.parametrize("head", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other(ops: Ops, dtype: torch.dtype, head: str) -> None:
    """One row, K + 1 = 7, nine, and a row of a second pass have the same bits."""
    hidden, *rest = arguments(dtype, 18, 48, 83, head)
    whole = ops.exit_head(hidden, *rest)
    for first, count in ((0, 1), (0, 7), (7, 9), (17, 1)):
        part = ops.exit_head(hidden[first : first + count], *rest)
        assert_same_bits(part, [one[first : first + count] for one in whole], f"({count} rows from {first})")


@pytest.mark.parametrize("head", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(17, 72), (32, 41), (33, 300), (64, 72), (65, 40), (40, 3000)])
def test_many_rows_have_the_bits_of_few(ops: Ops, rows: int, width: int, dtype: torch.dtype, head: str) -> None:
    """Of which a pass takes two, three or four groups of 16; of the last as many columns as fit beside the weights."""
    args = [*arguments(dtype, rows, width, 40, head), *sampling(rows)]
    whole = ops.exit_head(*args)
    for first in range(0, rows, 7):
        few = slice(first, min(first + 7, rows))
        part = ops.exit_head(args[0][few], *args[1:6], *(one[few] for one in args[6:]))
        assert_same_bits(part, [one[few] for one in whole], f"(rows from {first})")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5, 300])
def test_ties_go_to_the_lowest_row(ops: Ops, dtype: torch.dtype, vocab_size: int, int8: bool) -> None:
    """Within a tile, across tiles, and where all are equal."""
    values = torch.zeros(5, vocab_size)
    places = [[1, 3], [0, vocab_size - 1], [vocab_size // 2, vocab_size - 1], [4], []]
    for row, tied in enumerate(places):
        values[row, tied] = 3.0
    args = one_hot(dtype, values.tolist(), int8)
    expected = [tied[0] if tied else 0 for tied in places]
    assert ops.exit_head(*args).token.tolist() == expected
    args[4] = torch.arange(vocab_size).flip(0)  # the lowest row, not the lowest token
    assert ops.exit_head(*args).token.tolist() == [vocab_size - 1 - row for row in expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 99])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_head_names_no_token(ops: Ops, dtype: torch.dtype, place: int, value: float) -> None:
    args = arguments(dtype, 6, 40, 100, "subset")
    args[0] = args[0].abs()
    args[2][place, 7] = value
    out = ops.exit_head(*args)
    assert out.token.tolist() == [-1] * 6
    torch.testing.assert_close(out.logsumexp, exit_head_ref(*args)[2], equal_nan=True)
    torch.testing.assert_close(out.logit, exit_head_ref(*args)[1], equal_nan=True)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_row_names_no_token(ops: Ops, dtype: torch.dtype, value: float, head: str) -> None:
    """And the rows beside it are what they would be without it."""
    args = arguments(dtype, 6, 40, 50, head)
    expected = ops.exit_head(*args)
    args[0] = args[0].clone()
    args[0][3, 11] = value
    out = ops.exit_head(*args)
    assert out.token[3] == -1
    others = [0, 1, 2, 4, 5]
    assert_same_bits([one[others] for one in out], [one[others] for one in expected])


def test_stretches_of_minus_infinity(ops: Ops) -> None:
    """Tiles that are -inf hide no token; rows that are all -inf have none; NaN behind them is not lost."""
    hidden, head = torch.ones(2, 8), Inputs(torch.float32).normal(300, 8)
    head[:100] = float("-inf")
    out = ops.exit_head(hidden, torch.ones(8), head, 0.0)
    truth = head.double().sum(1)
    assert out.token.tolist() == [int(truth.argmax())] * 2
    torch.testing.assert_close(out.logsumexp.double(), truth.logsumexp(0).expand(2), rtol=1e-6, atol=1e-5)
    none = ops.exit_head(hidden, torch.ones(8), head[:100], 0.0)
    assert none.token.tolist() == [-1, -1]
    assert none.logit.tolist() == none.logsumexp.tolist() == [float("-inf")] * 2
    head[100:120] = float("nan")
    assert ops.exit_head(hidden, torch.ones(8), head, 0.0).token.tolist() == [-1, -1]


def sampling(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature (greedy among them), seed and offset, wider than 32 bits."""
    temperature = torch.tensor([0.7, 0.0, 1.0, 2.5]).repeat(rows)[:rows]
    seed = torch.arange(rows) * (2**33 + 7) - 5
    return temperature, seed, torch.arange(rows) * 11 + 2**32 * (torch.arange(rows) % 2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_match_the_reference(ops: Ops, dtype: torch.dtype, head: str) -> None:
    """The noise is the reference's and the logits nearly so: no row of these is near a tie."""
    rows, vocab_size = 9, 203
    args = [*arguments(dtype, rows, 41, vocab_size, head), *sampling(rows)]
    logits, truth = torch.full((2, rows, vocab_size), float("nan")).unbind()
    out = ops.exit_head(*args, logits)
    expected = exit_head_ref(*args, truth)
    assert out.token.tolist() == expected[0].tolist()
    torch.testing.assert_close(out.logit, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logsumexp, expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-5)  # not divided by the temperature
    greedy = ops.exit_head(*args[:6])
    assert_same_bits([one[1::4] for one in out], [one[1::4] for one in greedy])


def test_samples_have_the_softmax_as_their_distribution(ops: Ops) -> None:
    """Chi-square over draws of 8 tokens at two temperatures; 24.3 is the 0.999 quantile with 7 degrees of freedom."""
    values = torch.linspace(-1, 1, 8)
    args = one_hot(torch.float32, [values.tolist()])
    count = 1000
    for temperature in (0.5, 1.5):
        draws = ops.exit_head(
            args[0].expand(count, -1).contiguous(), *args[1:], torch.full((count,), temperature),
            torch.full((count,), 3), torch.arange(count),
        ).token  # fmt: skip
        expected = (values / temperature).softmax(0) * count
        chi_square = ((draws.bincount(minlength=8) - expected) ** 2 / expected).sum()
        assert chi_square < 24.3


def test_a_view_of_wider_rows(ops: Ops) -> None:
    """What a draft does: every second state of a buffer, logits into every second row of another one."""
    args = arguments(torch.bfloat16, 6, 64, 100, "full")
    expected = ops.exit_head(args[0][::2].contiguous(), *args[1:])
    logits = torch.zeros(6, 100)
    out = ops.exit_head(args[0][::2], *args[1:], None, None, None, logits[::2])
    assert_same_bits(out, expected)
    assert logits[::2].argmax(-1).tolist() == out.token.tolist()
    assert not logits[1::2].any()


@pytest.mark.parametrize("head", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_and_architectures_agree(emulated: type[Emulated], dtype: torch.dtype, head: str) -> None:
    """In any order of threads and blocks, and on a GPU without dependent launches and with less shared memory."""
    args = [*arguments(dtype, 10, 300, 130, head), *sampling(10)]
    expected = emulated().exit_head(*args)
    for seed, arch in ((1, 90), (2, 80), (3, 80)):
        assert_same_bits(emulated(seed, arch).exit_head(*args), expected, f"with seed {seed} on sm_{arch}")


def test_states_of_any_width(ops: Ops) -> None:
    """Not one of these fits beside the weights."""
    args = arguments(torch.float32, 2, 50000, 20, "full")
    out, truth = ops.exit_head(*args), exit_head_ref(*double(args))
    assert out.token.tolist() == truth[0].tolist()
    torch.testing.assert_close(out.logsumexp.double(), truth[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head"),
    [(torch.float32, "full"), (torch.float32, "int8"), (torch.bfloat16, "full"), (torch.float16, "int8")],
)
def test_parts_of_states_have_the_bits_of_whole_ones(emulated: type[Emulated], dtype: torch.dtype, head: str) -> None:
    """Three parts, the last one narrower and no whole segments; several tiles a warp, of some one less."""
    rows, width = (16, 3200) if dtype == torch.float32 else (64, 1700)
    args = [*arguments(dtype, rows, width, 16 * 170 + 5, head), *sampling(rows)]
    whole = emulated(1, 80).exit_head(*args)
    few = slice(rows - 3, rows)
    part = emulated(2, 80).exit_head(args[0][few], *args[1:6], *(one[few] for one in args[6:]))
    assert_same_bits(part, [one[few] for one in whole])
