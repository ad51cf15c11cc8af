"""What the op tests share: inputs, the float64 truth, the criterion, and bitwise comparison."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import layerskip_kernels as lk
from layerskip_kernels import _extension
from layerskip_kernels.schemas import bind

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARM = platform.machine() in ("aarch64", "arm64")
X86 = ("amx", "avx512_bf16", "avx512", "avx2")
ISAS = (*(("neon_bf16", "neon") if ARM else X86), "portable", "amx_emulated")
TILES = ("amx", "amx_emulated")  # bf16 alone; for other dtypes they are another instruction set
PATHS = ("reference", *ISAS)

# A result passes when its largest error against float64 is at most that of the same-dtype torch code plus this much of
# the truth's largest entry. Both round to the dtype once, so they differ by which way a near-tie is rounded and by the
# order of an fp32 sum: 16-bit dtypes get a quarter of the spacing of their numbers (2^-8 and 2^-11 relative), fp32
# eight spacings (2^-23), about what re-ordering a sum of 2048 products moves it by.
TOLERANCES = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13}

MANY_ROWS = (49, 64, 100)  # the last, more than any kernel takes at a time: 48 on the CPU, 64 on GPUs


@contextmanager
def running_on(name: str) -> Iterator[None]:
    """Force the reference, or the native kernels of one instruction set; skips where this machine lacks it."""
    if name == "reference":
        with lk.use_backend("reference"):
            yield
        return
    if _extension.cpu_reason is not None:
        pytest.skip(f"no native kernels: {_extension.cpu_reason}")
    try:
        before = lk.set_cpu_isa(name)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    try:
        with lk.use_backend("cpu"):
            yield
    finally:
        lk.set_cpu_isa(before)


def native_isa(expected: str) -> str:
    """The instruction set in use, which must be the one asked for."""
    assert lk.cpu_isa() == expected
    return expected


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(op: str, *args: Any, **named: Any) -> Any:
    """The public function of an op on the flat arguments of its schema, which it may take in bundles."""
    a = bind(op, *args, **named)
    if op not in ("partial_forward", "draft", "speculative_round"):
        return getattr(lk, op)(*a)
    cache = lk.KVCache(a.k_cache, a.v_cache, a.cos, a.sin, a.seq_lens, a.slots)
    if op == "partial_forward":
        return lk.partial_forward(a.hidden, a.weights, cache, a.start, a.end, a.eps)
    noise = None if a.temperature is None and a.seed is None else lk.Noise(a.temperature, a.seed)
    common: dict[str, Any] = {"eps": a.eps, "draft_threshold": a.draft_threshold, "noise": noise}
    common["num_draft_layers"] = a.num_draft_layers
    decoder = (a.token, a.embedding, a.weights, cache, a.exit_layer)
    if op == "draft":
        head = lk.Head(a.norm_weight, a.head_weight, a.token_map, a.scale)
        return lk.draft(*decoder, head, a.num_speculations, extend=a.extend, logits=a.logits, **common)
    given = (a.draft_norm_weight, a.draft_head_weight, a.draft_token_map, a.draft_head_scale)
    draft_head = None if all(one is None for one in given) else lk.Head(*given)
    head = lk.Head(a.norm_weight, a.head_weight)
    return lk.speculative_round(*decoder, head, a.num_speculations, draft_head=draft_head, **common)


class Inputs:
    """Reproducible random tensors."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """Scaled so that a product with a normal vector is of size 1."""
        return self.normal(*shape, scale=max(shape[-1], 1) ** -0.5)

    def norm(self, size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(size, generator=self.generator)).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def rope_tables(positions: int, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, C/2] in fp32, base 10000."""
    angles = torch.outer(torch.arange(positions).double(), 10000.0 ** (-torch.arange(0, size, 2).double() / size))
    return angles.cos().float(), angles.sin().float()


def needles(dtype: torch.dtype, split: int) -> tuple[list[Tensor], Tensor]:
    """Queries [1, 3, 2, 8] that each look for one position, as `verify_attention` takes them; and the answer.

    Sought are the first position, the last that all rows see, and both sides of the ends of one and of 32 splits. A key
    that is sought is 16 times a unit vector of its own and so is its query, a score of 90; all others are 0, so that
    together they weigh less than 1e-30. The answer is a small integer that is not 0.
    """
    capacity = 32 * split + 40
    wanted = [0, split - 1, split, 32 * split - 1, 32 * split, capacity - 3]
    units = 16 * torch.eye(6, 8, dtype=dtype)
    keys = torch.zeros(capacity, 8, dtype=dtype)
    keys[wanted] = units
    values = Inputs(dtype).integers(1, 101, capacity, 8).to(dtype)
    caches = [one.view(1, 1, capacity, 8) for one in (keys, values)]
    return [units.view(1, 3, 2, 8), *caches, torch.tensor([capacity - 3])], values[wanted].view(1, 3, 2, 8)


def double(value: Any) -> Any:
    """Floating tensors in float64, everything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    return [double(one) for one in value] if isinstance(value, (list, tuple)) else value


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest distance; infinite where either is not finite."""
    if truth.numel() == 0:
        return 0.0
    distance = (actual.double() - truth).abs()
    return float(distance.max()) if bool(distance.isfinite().all()) else float("inf")


def assert_as_good_as(actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The criterion of TOLERANCES."""
    assert actual.shape == truth.shape
    assert actual.is_contiguous()
    allowed = error(eager, truth)
    assert allowed != float("inf"), "the same-dtype torch code is not finite here: no criterion"
    if truth.numel():
        allowed += TOLERANCES[dtype] * float(truth.abs().max())
    found = error(actual, truth)
    assert found <= allowed, f"error {found:.3e} against float64, allowed {allowed:.3e}"


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, so that NaN equals itself and -0 is not 0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def assert_same_bits(actual: Any, expected: Any, message: str = "") -> None:
    if isinstance(expected, Tensor):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        different = int((bits(actual) != bits(expected)).sum())
        assert different == 0, f"{different} of {expected.numel()} entries differ {message}"
        return
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other, message)


def assert_rows_alone(op: Callable[..., Any], *activations: Tensor) -> None:
    """Rows [r, r + count) of a call must have the bits that a call with those rows alone gives."""
    rows = activations[0].shape[0]
    whole = op(*activations)
    for count in (1, 2, 5, 8):
        for first in range(0, rows - count + 1, count):
            part = op(*(one[first : first + count] for one in activations))
            assert_same_bits(part, _rows(whole, first, count), f"(rows {first}..{first + count - 1} of {rows})")


def assert_same_result(path: str, actual: Tensor, expected: Tensor) -> None:
    """The same numbers through other strides: native kernels to the bit, torch's matmul may sum in another order."""
    if path == "reference":
        torch.testing.assert_close(actual, expected)
    else:
        assert_same_bits(actual, expected)


def chi_square_p(samples: Tensor, probabilities: Tensor) -> float:
    """How likely samples of ``probabilities`` are to be as far from them as these; 0 where one has no probability."""
    expected = probabilities.double() * samples.numel()
    counts = torch.bincount(samples, minlength=expected.numel()).double()
    assert counts.numel() == expected.numel(), "a sample outside the distribution"
    possible = expected > 0
    if bool((counts[~possible] > 0).any()):
        return 0.0
    assert float(expected[possible].min()) > 5, "too few samples for the rarest value"
    statistic = ((counts - expected).square() / expected)[possible].sum()
    degrees = (possible.sum() - 1) / 2
    return float(torch.special.gammaincc(degrees.double(), statistic / 2))


def _rows(whole: Any, first: int, count: int) -> Any:
    if isinstance(whole, Tensor):
        return whole[first : first + count]
    return [one[first : first + count] for one in whole]


def assert_threads_agree(op: Callable[[], Any]) -> None:
    """One thread, two, and three (an uneven share) must give the same bits."""
    with threads(1):
        expected = op()
    for count in (2, 3):
        with threads(count):
            assert_same_bits(op(), expected, f"with {count} threads")


def strided(tensor: Tensor) -> Sequence[Tensor]:
    """The same values with other strides: a slice of wider rows, and, from rank 2, transposed storage."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    sliced = wide[..., 1 : 2 * tensor.shape[-1] + 1 : 2]
    sliced.copy_(tensor)
    if tensor.dim() < 2:
        return [sliced]
    return [sliced, tensor.transpose(0, -1).contiguous().transpose(0, -1)]
