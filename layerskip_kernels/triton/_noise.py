"""The noise of sampling on a card, as `layerskip_kernels._noise` defines it: no generator, so no state to capture."""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are typed by their launch)
from __future__ import annotations

import triton
import triton.language as tl

from .. import _noise

DRAW, ACCEPT, RESIDUAL = (tl.constexpr(stream) for stream in (_noise.DRAW, _noise.ACCEPT, _noise.RESIDUAL))
_SMALL, _LEAST = tl.constexpr(2.0**-10), tl.constexpr(2.0**-24)


@triton.jit
def uniform(seed, offset, token, STREAM: tl.constexpr):
    """(word + 1/2) 2^-32 in fp32, in (0, 1]; int64 ``seed`` and ``offset`` and int32 or int64 ``token`` broadcast."""
    low, high = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, token.to(tl.uint32), low, high, STREAM)
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(seed, offset, token, STREAM: tl.constexpr):
    """-log E, E = -log(1 - u)."""
    u = uniform(seed, offset, token, STREAM)
    return -tl.log(tl.where(u < _SMALL, u + u * u / 2, -tl.log(tl.maximum(1.0 - u, _LEAST))))


@triton.jit
def warmth(temperature):
    """What to divide logits by: the temperature, or 1 for a greedy row."""
    return tl.where(temperature > 0, temperature, 1.0)
