"""Formats of quantized weights.

A matmul's weight [N, D] is in the dtype of the activations, or packed: a tensor of bytes [N, D / group_size ·
group_bytes] in one of `FORMATS`. A row is its groups one after the other. A group is

    scale  fp16; in fp8 fp32
    least  fp16, in the formats with a zero point
    bytes  of its ``group_size`` values: int8 and fp8 one byte each; int4 by 32 values, the first half in the low and
           the second half in the high four bits of 16 bytes

and represents ``scale · value`` or, with a zero point, ``scale · value + least``. An int4 value is its four bits,
0 … 15, minus 8 in the formats without a zero point. So groups of 32 in int8, int4 and int4_zero are the blocks of
llama.cpp's Q8_0, Q4_0 and Q4_1. The bytes of a row and the width D identify the format: no two have the same number of
bytes for one width.

For CPUs that multiply bytes (AVX-512 VNNI), integers may be *interleaved* (`interleave`): a tensor of 16-bit words
[N, bytes / 2], in which each sixteen rows are a panel; N is a multiple of sixteen. A panel is

    headers of its groups, one after the other: the scales of the sixteen rows, then, in the formats with a zero point,
            the least values
    columns one for each four bytes of a row's values: these four of the first row, of the second, …; int8 values are
            unsigned here, greater by 128

so that one register, within one cache line, holds four neighbouring values of all sixteen rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .schemas import REQUIRED_WEIGHTS, LayerWeights, has_native, native_ops

BLOCK = 32  # values of an int4 block
PANEL_ROWS = 16
FP8_MAX = 448.0  # float8_e4m3fn
_SCALE_STEPS = 8  # candidate scales of a group on either side of the one that fits its extremes
_AT_ONCE = 1 << 21  # weights quantized at a time


class Format(NamedTuple):
    """Groups of ``group_size`` integers of ``bits`` each, or of float8_e4m3fn."""

    name: str
    bits: int
    group_size: int
    has_zero: bool = False
    is_float: bool = False

    @property
    def header(self) -> int:
        """Bytes before a group's values."""
        return 4 if self.has_zero or self.is_float else 2

    @property
    def group_bytes(self) -> int:
        return self.header + self.group_size * self.bits // 8

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` weights, a multiple of ``group_size``."""
        return width // self.group_size * self.group_bytes

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value, without `offset`."""
        if self.is_float:
            return -FP8_MAX, FP8_MAX
        if self.bits == 8:
            return -127, 127
        return (0, 15) if self.has_zero else (-8, 7)

    @property
    def offset(self) -> int:
        """Added to a value when it is written: four bits are unsigned."""
        return 8 if self.bits == 4 and not self.has_zero else 0


_ALL = (
    Format("int8", 8, 32),
    Format("int8_g128", 8, 128),
    Format("int4", 4, 32),
    Format("int4_g128", 4, 128),
    Format("int4_zero", 4, 32, has_zero=True),
    Format("int4_zero_g128", 4, 128, has_zero=True),
    Format("fp8", 8, 32, is_float=True),
    Format("fp8_g128", 8, 128, is_float=True),
)
FORMATS = {one.name: one for one in _ALL}
"""All formats by name."""


def is_packed(weight: Tensor) -> bool:
    """Return whether a weight is packed; an int8 draft head with a scale is not."""
    return weight.dtype == torch.uint8 or is_interleaved(weight)


def is_interleaved(weight: Tensor) -> bool:
    """Return whether a weight is packed in panels of sixteen rows."""
    return weight.dtype == torch.int16


def takes_packed(args: Iterable[Any]) -> bool:
    """Return whether a call has a packed weight; in a list of layers it looks at the first and the last."""
    first, last = len(REQUIRED_WEIGHTS), len(LayerWeights._fields)
    return any(
        is_packed(one)
        for arg in args
        for one in ((*arg[:first], *arg[-last:]) if isinstance(arg, (list, tuple)) else (arg,))
        if isinstance(one, Tensor)
    )


def format_of(weight: Tensor, width: int) -> Format:
    """Return the format of a packed weight [N, bytes] that multiplies states of ``width``.

    Raises
    ------
    ValueError
        If no format has this number of bytes for that width.
    """
    size = weight.shape[-1] * weight.itemsize
    known = [one for one in _ALL if width and not (one.is_float and is_interleaved(weight))]
    for one in known:
        if width % one.group_size == 0 and size == one.row_bytes(width):
            return one
    choices = ", ".join(f"{one.name} {one.row_bytes(width)}" for one in known if width % one.group_size == 0)
    raise ValueError(f"{size} bytes a row are no format of width {width} ({choices or 'none'})")


def kind_of(weight: Tensor, width: int) -> str:
    """Return how activations are converted for a weight: "plain", "integers" or "fp8"."""
    if not is_packed(weight):
        return "plain"
    return "fp8" if format_of(weight, width).is_float else "integers"


def named(name: str, width: int) -> Format:
    """Return the format of this name, for weights of ``width``.

    Raises
    ------
    ValueError
        If the name is unknown, or ``width`` is not a multiple of the group size.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown weight format {name!r}, expected one of {', '.join(FORMATS)}")
    found = FORMATS[name]
    if width % found.group_size:
        raise ValueError(f"{name} takes widths that are multiples of {found.group_size}, got {width}")
    return found


@torch.no_grad()
def quantize(weight: Tensor, name: str) -> Tensor:
    """Pack a weight, rounded to nearest with the scale of each group that minimises the error.

    Parameters
    ----------
    weight : Tensor [N, D]
        In fp32, bf16 or fp16.
    name : str
        One of `FORMATS`.

    Returns
    -------
    Tensor [N, bytes]

    Raises
    ------
    ValueError
        If the name is unknown, D is not a multiple of the group size, or a row holds NaN, infinity, or values too
        large or too small for fp16 scales.
    """
    form = named(name, weight.shape[1])
    out = weight.new_empty(weight.shape[0], form.row_bytes(weight.shape[1]), dtype=torch.uint8)
    step = max(1, _AT_ONCE // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], step):
        part = weight[first : first + step].float()
        groups = part.view(part.shape[0], -1, form.group_size)
        broken = (~groups.isfinite().all((1, 2))).nonzero()
        if broken.numel():
            raise ValueError(f"row {first + int(broken[0])} of the weight to quantize holds NaN or infinity")
        out[first : first + step] = pack(form, *fit(form, groups))
    return out


def fit(form: Format, groups: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Round groups to a format, with the candidate scale of least squared error; return the arguments of `pack`.

    Parameters
    ----------
    form : Format
    groups : Tensor [N, G, S], fp32
    importance : Tensor [S], optional
        A factor of the squared errors; by default 1.

    Returns
    -------
    values, scale and, in the formats with a zero point, least
    """
    if form.has_zero:
        return _fit_range(groups, importance)
    largest = groups.abs().amax(2)
    if form.is_float:
        scale = torch.where(largest > 0, largest / form.range[1], 1.0)
        return (groups / scale[:, :, None]).clamp(*form.range).to(torch.float8_e4m3fn), scale
    if form.bits == 8:
        scale = _rounded(largest / 127)
        return _nearest(groups, scale, -127, 127).to(torch.int8), scale
    # The value of largest magnitude becomes -8: the range has one more negative number.
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    best = _rounded(extreme / -8)
    values = _nearest(groups, best, -8, 7)
    least_error = _error(groups, values, best, importance)
    for step in range(-_SCALE_STEPS, _SCALE_STEPS + 1):
        scale = _rounded(extreme / (-8 + 0.1 * step))
        candidate = _nearest(groups, scale, -8, 7)
        error = _error(groups, candidate, scale, importance)
        better = error < least_error
        best, least_error = torch.where(better, scale, best), torch.where(better, error, least_error)
        values = torch.where(better[:, :, None], candidate, values)
    return values + 8, best


def _fit_range(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Round to four bits with a zero point; of some shrunken ranges choose the one of least squared error."""
    low, high = groups.amin(2), groups.amax(2)
    best_error = torch.full_like(low, float("inf"))
    best = (torch.zeros_like(groups), torch.ones_like(low), low)
    for step in range(_SCALE_STEPS + 1):
        inset = (high - low) * (0.02 * step)
        least = (low + inset).to(torch.float16).float()
        scale = _rounded((high - low - 2 * inset) / 15)
        values = _nearest(groups - least[:, :, None], scale, 0, 15)
        error = _error(groups - least[:, :, None], values, scale, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        chosen = (better[:, :, None], better, better)
        new = (values, scale, least)
        best = tuple(torch.where(*one) for one in zip(chosen, new, best, strict=True))  # type: ignore[assignment]
    if not bool(best_error.isfinite().all()):
        worst = float((high - low)[~best_error.isfinite()][0])
        raise ValueError(f"fp16 cannot hold the scale of a group that spans {worst:g}")
    return best


def _rounded(scale: Tensor) -> Tensor:
    """Round scales to fp16, as they are stored; a group of zeros has scale 1."""
    scale = scale.to(torch.float16).float()
    return torch.where(scale == 0, 1.0, scale)


def _nearest(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (groups / scale[:, :, None]).round_().clamp_(low, high)


def _error(groups: Tensor, values: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    squares = (values * scale[:, :, None] - groups).square()
    return squares.sum(2) if importance is None else squares @ importance


def pack(form: Format, values: Tensor, scale: Tensor, least: Tensor | None = None) -> Tensor:
    """Return the bytes of groups.

    Parameters
    ----------
    form : Format
    values : Tensor [N, G, S]
        int8; four bits as 0 … 15; fp8 as float8_e4m3fn.
    scale : Tensor [N, G]
    least : Tensor [N, G], optional
        In the formats with a zero point.

    Returns
    -------
    Tensor [N, bytes], uint8

    Raises
    ------
    ValueError
        If fp16 cannot hold a scale: it overflows, or underflow loses more than 1 %.
    """
    if form.is_float:
        headers = [scale.float().unsqueeze(-1).contiguous().view(torch.uint8)]
    else:
        headers = [_halves(one) for one in (scale, least) if one is not None]
    if form.bits == 4:
        blocks = values.to(torch.uint8).view(*values.shape[:2], -1, 2, BLOCK // 2)
        content = (blocks[..., 0, :] | blocks[..., 1, :] << 4).flatten(2)
    else:
        content = values.contiguous().view(torch.uint8)
    return torch.cat([*headers, content], dim=2).flatten(1)


def _halves(numbers: Tensor) -> Tensor:
    """fp16 as two bytes each, [N, G, 2]."""
    half = numbers.to(torch.float16)
    lost = (half.float() - numbers.float()).abs() > 0.01 * numbers.float().abs()
    lost &= numbers.float().abs() > 2.0**-24  # below that a group is as good as zero
    if bool((~half.isfinite() | lost).any()):
        worst = numbers[~half.isfinite() | lost][0]
        raise ValueError(f"fp16 cannot hold the scale or least value {float(worst):g} of a group")
    return half.unsqueeze(-1).contiguous().view(torch.uint8)


def unpack(weight: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo `pack`: values [N, G, S] (four bits as 0 … 15), scale and least [N, G], in fp32."""
    form = format_of(weight, width)
    groups = rows_of(weight, width).unflatten(1, (-1, form.group_bytes))
    headers = groups[:, :, : form.header].contiguous().view(torch.float32 if form.is_float else torch.float16).float()
    content = groups[:, :, form.header :]
    if form.bits == 4:
        blocks = content.unflatten(2, (-1, BLOCK // 2))
        values = torch.stack([blocks & 15, blocks >> 4], dim=3).flatten(2).float()
    elif form.is_float:
        values = content.contiguous().view(torch.float8_e4m3fn).float()
    else:
        values = content.contiguous().view(torch.int8).float()
    return values, headers[:, :, 0], headers[:, :, 1] if form.has_zero else None


def dequantize(weight: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values that a weight represents.

    Parameters
    ----------
    weight : Tensor [N, width], or packed [N, bytes]
    width : int
    dtype : torch.dtype
        Of the result; a packed weight is computed in fp32, or float64 for float64, and rounded once.

    Returns
    -------
    Tensor [N, width]
    """
    if not is_packed(weight):
        return weight.to(dtype)
    form = format_of(weight, width)
    values, scale, least = unpack(weight, width)
    if dtype == torch.float64:
        values, scale, least = values.double(), scale.double(), None if least is None else least.double()
    if form.bits == 4 and not form.has_zero:
        values = values - 8
    out = values * scale[:, :, None]
    if least is not None:
        out = out + least[:, :, None]
    return out.flatten(1).to(dtype)


def plain(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """`dequantize` by a native kernel, on CPU tensors and if the library was built."""
    if not is_packed(weight) or not weight.is_cpu or not _has_native("dequantize"):
        return dequantize(weight, width, dtype)
    out = torch.empty(weight.shape[0], width, dtype=dtype)
    native_ops.dequantize(weight, out)
    return out


def can_interleave(weight: Tensor, width: int) -> bool:
    """Return whether `interleave` accepts a weight."""
    packed = is_packed(weight) and not is_interleaved(weight)
    return packed and weight.shape[0] % PANEL_ROWS == 0 and not format_of(weight, width).is_float


def interleave(weight: Tensor, width: int, out: Tensor | None = None) -> Tensor:
    """Reorder a packed weight into panels of sixteen rows, as the docstring of this module describes.

    Parameters
    ----------
    weight : Tensor [N, bytes], uint8
        Of integers; N is a multiple of 16.
    width : int
    out : Tensor [N, bytes / 2], int16, optional
        Output buffer.

    Returns
    -------
    Tensor [N, bytes / 2], int16
        ``out``, if it is given.

    Raises
    ------
    ValueError
        If the weight is plain, fp8, or interleaved already, or N is no multiple of 16.
    """
    if not can_interleave(weight, width):
        raise ValueError(f"cannot interleave a {weight.dtype} weight {list(weight.shape)} of width {width}")
    form = format_of(weight, width)
    if out is None:
        out = weight.new_empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.int16)
    if weight.is_cpu and weight.numel() and _has_native("interleave"):
        native_ops.interleave(weight.contiguous(), width // form.group_size, form.header, form.bits == 8, out)
        return out
    step = max(1, _AT_ONCE // (PANEL_ROWS * weight.shape[1]) if weight.numel() else 1) * PANEL_ROWS
    for first in range(0, weight.shape[0], step):
        rows = weight[first : first + step]
        groups = rows.view(-1, PANEL_ROWS, width // form.group_size, form.group_bytes).transpose(1, 2)
        headers, values = groups[..., : form.header], groups[..., form.header :]
        if form.bits == 8:
            values = values ^ 128
        parts = [headers.unflatten(3, (-1, 2)).transpose(2, 3), values.unflatten(3, (-1, 4)).transpose(2, 3)]
        panels = torch.cat([part.flatten(1) for part in parts], dim=1)
        out[first : first + step] = panels.view(torch.int16).view(rows.shape[0], -1)
    return out


def rows_of(weight: Tensor, width: int) -> Tensor:
    """Undo `interleave`; a weight that is not interleaved is returned as it is."""
    if not is_interleaved(weight):
        return weight
    out = weight.new_empty(weight.shape[0], 2 * weight.shape[1], dtype=torch.uint8)
    step = max(1, _AT_ONCE // max(1, out.shape[1]))
    for rows in torch.arange(weight.shape[0], device=weight.device).split(step):
        out[rows[0] : rows[-1] + 1] = _take_rows(weight, rows, width)
    return out


def _take_rows(weight: Tensor, index: Tensor, width: int) -> Tensor:
    """Rows [n] of an interleaved weight: [n, bytes]."""
    form = format_of(weight, width)
    groups, panels = width // form.group_size, weight.view(torch.uint8).unflatten(0, (-1, PANEL_ROWS)).flatten(1)
    size = groups * form.header * PANEL_ROWS
    headers = panels[:, :size].unflatten(1, (groups, -1, PANEL_ROWS, 2))
    values = panels[:, size:].unflatten(1, (groups, -1, PANEL_ROWS, 4))
    panel, lane = index // PANEL_ROWS, index % PANEL_ROWS
    taken = [part[panel, :, :, lane].flatten(2) for part in (headers, values)]
    if form.bits == 8:
        taken[1] = taken[1] ^ 128
    return torch.cat(taken, dim=2).flatten(1)


@cache
def _has_native(op: str) -> bool:
    return has_native(op, "CPU")


def lookup(weight: Tensor, index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding [V, width], plain or packed: [*index, width] in ``dtype``."""
    if not is_packed(weight):
        return F.embedding(index, weight)
    chosen = index.reshape(-1)
    rows = _take_rows(weight, chosen, width) if is_interleaved(weight) else weight[chosen]
    return dequantize(rows, width, dtype).view(*index.shape, width)
