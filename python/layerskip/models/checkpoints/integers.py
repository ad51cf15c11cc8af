"""Integers of four and eight bits, as checkpoints keep them in 32-bit words, and their groups as packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.formats import FORMATS, Format, pack

from ..files import ModelFileError
from ..unsupported import unsupported

SIZES = (128, 32)  # of the groups of packed weights, the best first


def check_group_size(method: str, size: object) -> None:
    """Refuse a ``group_size`` that packed weights cannot have; -1 or none is a scale for each output."""
    if size not in (None, -1) and not (isinstance(size, int) and size > 0 and size % SIZES[-1] == 0):
        raise unsupported(f"{method} with group_size {size!r}", "32, 64, 128, other multiples of 32, and -1")


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers [A, B] in words [A, B · bits / 32], int32, the first of a word in its lowest bits."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack([octets & 15, octets >> 4], dim=-1).flatten(1)


def signed(values: Tensor) -> Tensor:
    """Unsigned 8-bit integers less 128."""
    return (values ^ 128).view(torch.int8)


def packed_integers(
    name: str, bits: int, values: Tensor, scale: Tensor, zero: Tensor | None, group_size: object
) -> Tensor:
    """A packed weight of ``scale · (values - zero)``.

    Parameters
    ----------
    name : str
        Of the weight, for messages.
    bits : int
        4 or 8.
    values : Tensor [N, D], uint8
    scale : Tensor [N, G]
        Of G groups of a row, all of one size.
    zero : Tensor [N, G], integers, optional
        None: the middle, 2 to the power of ``bits`` - 1.
    group_size : int or None
        What the configuration says; None or -1 is one group a row.

    Raises
    ------
    ModelFileError
        If the groups are no multiple of 32 weights or not as many as the configuration says, or 8-bit ones have zero
        points other than the middle.
    """
    middle = 1 << (bits - 1)
    if zero is not None and bool((zero == middle).all()):
        zero = None
    if zero is not None and bits == 8:
        raise ModelFileError(f"{name} has 8-bit weights with zero points; supported: symmetric ones")
    size = _group_size(name, values.shape[1], scale.shape[1], group_size)
    form = FORMATS[
        ("int8" if bits == 8 else "int4" if zero is None else "int4_zero") + ("_g128" if size == 128 else "")
    ]
    scale = scale.float()
    least = None if zero is None else _repeated(-scale * zero.float(), form, values.shape[1])
    return _packed(name, form, signed(values) if bits == 8 else values, scale, least)


def packed_floats(name: str, values: Tensor, scale: Tensor, group_size: object) -> Tensor:
    """A packed weight of ``scale · values``: values [N, D] in float8_e4m3fn, scale [N, G] of G groups of a row."""
    size = _group_size(name, values.shape[1], scale.shape[1], group_size)
    return _packed(name, FORMATS["fp8_g128" if size == 128 else "fp8"], values, scale.float(), None)


def _packed(name: str, form: Format, values: Tensor, scale: Tensor, least: Tensor | None) -> Tensor:
    scale = _repeated(scale, form, values.shape[1])
    try:
        return pack(form, values.unflatten(1, (-1, form.group_size)), scale, least)
    except ValueError as error:
        raise ModelFileError(f"{name}: {error}") from None


def _group_size(name: str, width: int, groups: int, configured: object) -> int:
    """That of the packed weight: a group of the checkpoint becomes several with equal scales."""
    given = configured if isinstance(configured, int) and configured > 0 else width
    if groups != 1 and groups * given != width:
        raise ModelFileError(
            f"{name} has {groups} groups in rows of {width} weights, its quantization_config says groups of {given}"
        )
    for size in SIZES:
        if width % groups == 0 and width // groups % size == 0:
            return size
    raise ModelFileError(
        f"{name} has {groups} groups in rows of {width} weights; supported: groups of a multiple of 32"
    )


def _repeated(numbers: Tensor, form: Format, width: int) -> Tensor:
    return numbers.repeat_interleave(width // form.group_size // numbers.shape[1], dim=1)
