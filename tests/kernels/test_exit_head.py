"""`exit_head`: norm, head, arg-max and log-sum-exp, without the logits ever being written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels import _extension
from layerskip_kernels.reference import exit_head_ref

from .common import (
    DTYPES,
    MANY_ROWS,
    PATHS,
    Inputs,
    assert_as_good_as,
    assert_rows_alone,
    assert_same_bits,
    assert_threads_agree,
    double,
    running_on,
    strided,
)

EPS = 1e-5
# R, D, V
SHAPES = [(1, 1, 1), (7, 9, 41), (9, 41, 7), (0, 16, 8), (1, 576, 1536), (17, 64, 2048), (6, 2048, 513), (3, 40, 5003)]
HEADS = ["full", "subset", "int8", "int8 subset"]


def arguments(dtype: torch.dtype, rows: int, width: int, vocab_size: int, head: str) -> list[Tensor | float | None]:
    make = Inputs(dtype)
    hidden, norm = make.normal(rows, width, scale=3.0), make.norm(width)
    token_map = make.integers(0, 2**33, vocab_size) if "subset" in head else None
    if "int8" not in head:
        return [hidden, norm, make.weight(vocab_size, width), EPS, token_map, None]
    scale = (0.5 + torch.rand(vocab_size, generator=make.generator)) * (width**-0.5 / 64)
    return [hidden, norm, make.integers(-127, 128, vocab_size, width).to(torch.int8), EPS, token_map, scale]


def logits(args: list[Tensor | float | None], norm: Tensor) -> Tensor:
    out = norm @ args[2].to(norm.dtype).T
    return out if args[5] is None else out * args[5].to(norm.dtype)


def eager(args: list[Tensor | float | None]) -> tuple[Tensor, Tensor]:
    """torch's own norm, rounded to the dtype as a model does, and an fp32 product: its logit and log-sum-exp."""
    normed = F.rms_norm(args[0], args[0].shape[-1:], args[1], EPS)
    out = logits(args, normed.float())
    return out.amax(-1), out.logsumexp(-1)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(path: str, shape: tuple[int, int, int], dtype: torch.dtype, head: str) -> None:
    args = arguments(dtype, *shape, head)
    wide = double(args)
    _, logit, logsumexp = exit_head_ref(*wide)
    out = lk.exit_head(*args)
    same = eager(args)
    assert_as_good_as(out.logit, same[0], logit, dtype)
    assert_as_good_as(out.logsumexp, same[1], logsumexp, dtype)
    # A near-tie may go either way, but the token must have a logit as near the best as roundings explain.
    true_logits = logits(wide, F.rms_norm(wide[0], wide[0].shape[-1:], wide[1], EPS))
    tokens = torch.arange(shape[2]) if args[4] is None else args[4]
    matches = (out.token[:, None] == tokens).nonzero()
    assert matches[:, 0].tolist() == list(range(shape[0]))
    assert_as_good_as(true_logits[matches[:, 0], matches[:, 1]], same[0], logit, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(path: str, dtype: torch.dtype) -> None:
    for rows in range(1, 18):
        args = arguments(dtype, rows, 97, 203, "full")
        _, logit, logsumexp = exit_head_ref(*double(args))
        out = lk.exit_head(*args)
        assert_as_good_as(out.logit, eager(args)[0], logit, dtype)
        assert_as_good_as(out.logsumexp, eager(args)[1], logsumexp, dtype)


@pytest.mark.parametrize("head", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", MANY_ROWS)
def test_many_rows(path: str, rows: int, dtype: torch.dtype, head: str) -> None:
    """Right to the last, and with the bits that it has alone."""
    args = arguments(dtype, rows, 97, 203, head)
    _, logit, logsumexp = exit_head_ref(*double(args))
    out = lk.exit_head(*args)
    assert_as_good_as(out.logit, eager(args)[0], logit, dtype)
    assert_as_good_as(out.logsumexp, eager(args)[1], logsumexp, dtype)
    if path != "reference":
        assert_same_bits(lk.exit_head(args[0][-1:], *args[1:]), [one[-1:] for one in out])


def one_hot(dtype: torch.dtype, values: list[list[float]], int8: bool = False) -> list[Tensor | float | None]:
    """Arguments whose logits are ``values`` [R, V] exactly, times a positive factor the row's norm adds."""
    rows = torch.tensor(values)
    hidden = torch.eye(rows.shape[0], dtype=dtype)
    head = rows.T.contiguous().to(torch.int8 if int8 else dtype)
    norm = torch.ones(rows.shape[0], dtype=dtype)
    return [hidden, norm, head, 0.0, None, torch.ones(head.shape[0]) if int8 else None]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5, 300, 5003])
def test_ties_go_to_the_lowest_row(path: str, dtype: torch.dtype, vocab_size: int, int8: bool) -> None:
    """Within a vector, across the tiles of a vocabulary, and where all are equal."""
    values = torch.zeros(5, vocab_size)
    places = [[1, 3], [0, vocab_size - 1], [vocab_size // 2, vocab_size - 1], [4], []]
    for row, tied in enumerate(places):
        values[row, tied] = 3.0
    args = one_hot(dtype, values.tolist(), int8)
    expected = [tied[0] if tied else 0 for tied in places]
    assert lk.exit_head(*args).token.tolist() == expected
    args[4] = torch.arange(vocab_size).flip(0)  # the lowest row, not the lowest token
    assert lk.exit_head(*args).token.tolist() == [vocab_size - 1 - row for row in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_logits_negative(path: str, dtype: torch.dtype) -> None:
    values = [[-5.0] * 99, [-120.0] * 99]
    values[0][70], values[1][98] = -2.0, -100.0
    args = one_hot(dtype, values)
    expected = exit_head_ref(*double(args))
    out = lk.exit_head(*args)
    assert out.token.tolist() == [70, 98]
    torch.testing.assert_close(out.logsumexp.double(), expected[2], rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 299])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_head_names_no_token(path: str, dtype: torch.dtype, place: int, value: float) -> None:
    args = arguments(dtype, 6, 40, 300, "subset")
    args[0] = args[0].abs()
    args[2][place, 7] = value
    assert lk.exit_head(*args).token.tolist() == [-1] * 6


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_row_names_no_token(path: str, dtype: torch.dtype, value: float, head: str) -> None:
    """And the rows beside it are what they would be without it."""
    args = arguments(dtype, 6, 40, 300, head)
    expected = lk.exit_head(*args)
    args[0] = args[0].clone()
    args[0][3, 11] = value
    out = lk.exit_head(*args)
    assert out.token[3] == -1
    others = [0, 1, 2, 4, 5]
    assert_same_bits([one[others] for one in out], [one[others] for one in expected])


def test_probability(path: str) -> None:
    args = one_hot(torch.float32, [[1.0, 3.0, 2.0]])
    out = lk.exit_head(*args)
    expected = torch.tensor([1.0, 3.0, 2.0]).softmax(0)[1]
    torch.testing.assert_close((out.logit - out.logsumexp).exp()[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_weights(path: str, dtype: torch.dtype) -> None:
    """The head may be the embedding itself, and a prefix of its rows an own head."""
    make = Inputs(dtype)
    embedding, norm = make.normal(300, 64), make.norm(64)
    hidden = embedding[[7, 250, 31]]
    assert lk.exit_head(hidden, norm.abs(), embedding, EPS).token.tolist() == [7, 250, 31]
    draft_vocab_size = lk.exit_head(hidden, norm.abs(), embedding[:100], EPS)
    assert draft_vocab_size.token[[0, 2]].tolist() == [7, 31]
    assert draft_vocab_size.token[1] < 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_map_equals_the_rows_it_names(path: str, dtype: torch.dtype) -> None:
    args = arguments(dtype, 6, 40, 300, "full")
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:77]
    part = lk.exit_head(*args[:2], args[2][rows].contiguous(), EPS, rows)
    plain = lk.exit_head(*args[:2], args[2][rows].contiguous(), EPS)
    assert part.token.tolist() == rows[plain.token].tolist()
    assert_same_bits(part[1:], plain[1:])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_activations(path: str, dtype: torch.dtype, head: str) -> None:
    args = arguments(dtype, 6, 40, 300, head)
    expected = lk.exit_head(*args)
    for other in strided(args[0]):
        out = lk.exit_head(other, *args[1:])
        assert out.token.tolist() == expected.token.tolist()
        torch.testing.assert_close(out.logsumexp, expected.logsumexp)


def test_inputs_are_unchanged(path: str) -> None:
    args = arguments(torch.float32, 3, 40, 300, "int8 subset")
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    copies = [tensor.clone() for tensor in tensors]
    lk.exit_head(*args)
    assert_same_bits(tensors, copies)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(41, 1000), (576, 333)])
def test_rows_do_not_depend_on_each_other(isa: str, shape: tuple[int, int], dtype: torch.dtype, head: str) -> None:
    hidden, *rest = arguments(dtype, 17, *shape, head)
    assert_rows_alone(lambda hidden: lk.exit_head(hidden, *rest), hidden)


@pytest.mark.parametrize("head", ["full", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_agree(isa: str, dtype: torch.dtype, head: str) -> None:
    args = arguments(dtype, 6, 64, 5003, head)
    assert_threads_agree(lambda: lk.exit_head(*args))


MEASURE = """
import sys
import torch
import layerskip_kernels as lk

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))

torch.manual_seed(0)
rows, width, vocabulary = 8, 64, 128256
hidden, norm = torch.randn(rows, width).bfloat16(), torch.ones(width).bfloat16()
head = torch.randn(vocabulary, width).bfloat16()
with lk.use_backend(sys.argv[1]):
    lk.exit_head(hidden[:1], norm, head[:256], 1e-5)  # threads and libraries are loaded
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = status("VmRSS")
    lk.exit_head(hidden, norm, head, 1e-5)
    print(status("VmHWM") - before)
"""


def peak_kib(backend: str) -> int:
    done = subprocess.run([sys.executable, "-c", MEASURE, backend], capture_output=True, text=True, check=False)
    if "clear_refs" in done.stderr:
        pytest.skip(f"the peak cannot be measured here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(_extension.cpu_reason is not None, reason=f"no native kernels: {_extension.cpu_reason}")
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """8 rows of 128256 fp32 logits are 4008 KiB. The reference, which writes them, shows that this would be seen."""
    assert peak_kib("reference") > 4008
    assert peak_kib("cpu") < 1000


@pytest.mark.parametrize("path", PATHS)
def test_a_stretch_of_minus_infinity_hides_no_token(path: str) -> None:
    """Rows whose logits are -inf, a whole stretch of the vocabulary among them, only never win."""
    hidden, head = torch.ones(2, 8), Inputs(torch.float32).normal(700, 8)
    head[:300] = float("-inf")
    with running_on(path):
        out = lk.exit_head(hidden, torch.ones(8), head, 0.0)
    truth = head.double().sum(1)
    assert out.token.tolist() == [int(truth.argmax())] * 2
    torch.testing.assert_close(out.logsumexp.double(), truth.logsumexp(0).expand(2), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_nan_behind_minus_infinity_is_not_lost(path: str) -> None:
    """A stretch of -inf, then one of NaN, then finite logits: the row names no token."""
    head = Inputs(torch.float32).normal(900, 8)
    head[:300], head[300:600] = float("-inf"), float("nan")
    with running_on(path):
        assert lk.exit_head(torch.ones(1, 8), torch.ones(8), head, 0.0).token.tolist() == [-1]
