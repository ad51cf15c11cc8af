"""Counter-based noise (Philox4x32-10) without generator state.

Each number depends on the seed, the ``offset``, which is the row's position, the token and the ``stream``, its purpose.
So a draw does not depend on the batch, the slot or the number of draft tokens, and all backends draw the same. Written
in int64, which torch has on every device; all words are in [0, 2^32).
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAW, ACCEPT, RESIDUAL = range(3)  # streams: a draft or autoregressive token, its acceptance, the token after it

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SMALL = 2.0**-10  # below it log(1 - u) loses digits, and u + u^2/2 is exact to fp32
_LEAST = 2.0**-24  # u may round to 1


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two words, which overflows int64."""
    low = factor * (word & 0xFFFF)
    middle = factor * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four words out of four counter words and two key words; they broadcast."""
    (a, b, c, d), (key_a, key_b) = counter, key
    for _ in range(10):
        high_a, low_a = _multiply(_MULTIPLIERS[0], a)
        high_c, low_c = _multiply(_MULTIPLIERS[1], c)
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + _WEYL[0]) & _WORD, (key_b + _WEYL[1]) & _WORD
    return a, b, c, d


def uniform(seed: Tensor, offset: Tensor, token: Tensor, stream: int) -> Tensor:
    """(word + 1/2) 2^-32 in fp32, in (0, 1]; ``seed``, ``offset`` and ``token`` broadcast."""
    counter = (token & _WORD, offset & _WORD, (offset >> 32) & _WORD, torch.full_like(offset, stream))
    word = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))[0]
    return (word.float() + 0.5) * 2.0**-32


def gumbel(seed: Tensor, offset: Tensor, token: Tensor, stream: int) -> Tensor:
    """-log E with E = -log(1 - u): the arg-max of z + noise is a sample of softmax(z)."""
    u = uniform(seed, offset, token, stream)
    return -torch.where(u < _SMALL, u + u * u / 2, -(1 - u).clamp_min(_LEAST).log()).log()
