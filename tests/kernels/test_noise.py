"""The noise of sampling: Philox against its published answers, and the uniform and Gumbel numbers made of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerskip_kernels import _noise

from .common import chi_square_p

ONES = 0xFFFFFFFF
# Known answers of the authors' library (Random123, kat_vectors: philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar(value: int) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    out = _noise.philox(tuple(map(scalar, counter)), tuple(map(scalar, key)))
    assert tuple(int(word) for word in out) == words


def words_of(monkeypatch: pytest.MonkeyPatch, *words: int) -> None:
    monkeypatch.setattr(_noise, "philox", lambda counter, key: (torch.tensor(words),))


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counter (token, offset low, offset high, stream) under key (seed low, seed high), negative numbers included."""
    seen = []
    monkeypatch.setattr(_noise, "philox", lambda counter, key: seen.append((counter, key)) or (torch.tensor([0]),))
    _noise.uniform(scalar(-(2**33) + 5), scalar(7 * 2**32 + 9), scalar(11), _noise.RESIDUAL)
    (counter, key) = seen[0]
    assert [int(word) for word in counter] == [11, 9, 7, 2]
    assert [int(word) for word in key] == [5, ONES - 1]


def test_uniform_numbers_are_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    words_of(monkeypatch, 0, 1, 2**31, ONES)
    found = _noise.uniform(scalar(0), scalar(0), scalar(0), 0)
    assert found.tolist() == [2.0**-33, 1.5 * 2.0**-32, 0.5, 1.0]


def test_gumbel_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """-log(-log(1 - u)), on both sides of where the formula changes, at a few spacings of fp32."""
    edge = 2**22  # u = 2^-10
    words_of(monkeypatch, 0, 1, 1000, edge - 2, edge - 1, edge, edge + 1, 2**29, 2**31, 2**32 - 2**20, ONES)
    u = _noise.uniform(scalar(0), scalar(0), scalar(0), 0)
    truth = -torch.log(-torch.log1p(-u.double().clamp_max(1 - 2.0**-24)))
    found = _noise.gumbel(scalar(0), scalar(0), scalar(0), 0)
    # 1 - u is rounded to 2^-25, which the least E taken through log, 2^-10, feels as 2^-15
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=2.0**-14)
    assert found.isfinite().all()


@pytest.mark.parametrize("vary", ["seed", "offset", "token"])
def test_uniform_in_every_argument(vary: str) -> None:
    """Consecutive seeds, positions or tokens give independent numbers: each, and the sums of neighbours."""
    count, bins = 200_000, 64
    arguments = {name: torch.arange(count) if name == vary else scalar(3) for name in ("seed", "offset", "token")}
    arguments["offset"] = arguments["offset"].expand(count)
    u = _noise.uniform(*arguments.values(), _noise.DRAW).double()
    even = torch.full((bins,), 1 / bins)
    assert chi_square_p((u * bins).long().clamp_max(bins - 1), even) > 1e-4
    assert chi_square_p(((u[1::2] + u[::2]) % 1 * bins).long().clamp_max(bins - 1), even) > 1e-4


def test_streams_differ() -> None:
    draws = [_noise.uniform(scalar(1), torch.arange(1000), scalar(0), stream) for stream in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (draws[one] == draws[other]).sum() == 0
        correlation = torch.corrcoef(torch.stack([draws[one], draws[other]]))[0, 1]
        assert abs(float(correlation)) < 0.15
