"""Cross-entropy of all exits by tiles of vocabulary × rows, recomputed in the backward; no [R, V] tensor, no atomics.

The backward writes tiles of slopes, softmax - one-hot times a scale, in the model's dtype and multiplies them into both
gradients, which accumulate in fp32. The scales are normalised to at most 1 first: 1 / (number of labels) could
underflow in fp16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_labels, label_counts
from ._device import dot, row_dot
from ._launch import INTERPRETED, launch_options, on, power_of_two, wait_for_inputs
from .rms_norm import rms_norm

GROUP = 16  # vocabulary tiles per program of the forward
ROWS_AT_ONCE, VOCABULARY_AT_ONCE = 4096, 4096  # of the slopes, 32 MiB in 16 bits
PROGRAMS = 256  # of the norm's backward; each writes one partial sum of the weight's gradient


@triton.jit
def early_exit_loss_kernel(
    x_ptr, head_ptr, labels_ptr, peak_ptr, sum_ptr, own_ptr, rows, per_exit, vocab_size, hidden_size,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """max z and Σ exp(z - max) of z = x headᵀ over GROUP tiles of the vocabulary, and the label's own z."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    wait_for_inputs(PDL)
    label = tl.load(labels_ptr + row % per_exit, mask=row_ok, other=-1)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    mass, own = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    first_col = tl.program_id(1) * GROUP * BLOCK_N
    for tile in range(GROUP):
        col = first_col + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        logits = row_dot(
            x_ptr, head_ptr, row, col, row_ok, col < vocab_size, hidden_size, 0, hidden_size,
            ROWS, BLOCK_N, BLOCK_K, EVEN, INTERPRETED,
        )  # fmt: skip
        logits = tl.where((col < vocab_size)[None, :], logits, float("-inf"))
        own += tl.sum(tl.where(label[:, None] == col[None, :], logits, 0.0), axis=1)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        peak = higher
    last_col = tl.minimum(first_col + GROUP * BLOCK_N, vocab_size)
    tl.store(own_ptr + row, own, mask=row_ok & (label >= first_col) & (label < last_col))
    target = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(peak_ptr + target, peak, mask=row_ok)
    tl.store(sum_ptr + target, mass, mask=row_ok)


@triton.jit
def early_exit_loss_finish_kernel(
    peak_ptr, sum_ptr, lse_ptr, rows, groups, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """log Σ exp z of BLOCK rows, the groups joined in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    wait_for_inputs(PDL)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for group in range(0, groups):
        here = tl.load(peak_ptr + row.to(tl.int64) * groups + group, mask=ok, other=0.0)
        part = tl.load(sum_ptr + row.to(tl.int64) * groups + group, mask=ok, other=1.0)
        higher = tl.maximum(peak, here)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(peak - base) + part * tl.exp(here - base)
        peak = higher
    tl.store(lse_ptr + row, peak + tl.log(mass), mask=ok)


@triton.jit
def softmax_slope_kernel(
    x_ptr, head_ptr, labels_ptr, lse_ptr, scale_ptr, slope_ptr, first_row, stop_row, first_col, stop_col,
    per_exit, hidden_size, stride, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """scale · (exp(z - lse) - [label]) of the rows and vocabulary [first, stop), into a buffer that starts there."""
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = first_col + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = row < stop_row, col < stop_col
    wait_for_inputs(PDL)
    logits = row_dot(
        x_ptr, head_ptr, row, col, row_ok, col_ok, hidden_size, 0, hidden_size, ROWS, BLOCK_N, BLOCK_K, EVEN,
        INTERPRETED
    )  # fmt: skip
    label = tl.load(labels_ptr + row % per_exit, mask=row_ok, other=-1)
    scale = tl.load(scale_ptr + row, mask=row_ok, other=0.0)
    slope = tl.exp(logits - tl.load(lse_ptr + row, mask=row_ok, other=0.0)[:, None])
    slope -= tl.where(label[:, None] == col[None, :], 1.0, 0.0)
    slope *= scale[:, None]
    target = slope_ptr + (row - first_row).to(tl.int64)[:, None] * stride + (col - first_col)[None, :]
    tl.store(target, slope.to(slope_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def accumulate_kernel(
    a_ptr, b_ptr, total_ptr, rows, columns, depth, a_row, a_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """total [rows, columns] += a [rows, depth] b [depth, columns], in fp32; a may be transposed."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = (row < rows)[:, None], (col < columns)[None, :]
    target = total_ptr + row.to(tl.int64)[:, None] * columns + col[None, :]
    wait_for_inputs(PDL)
    total = tl.load(target, mask=row_ok & col_ok, other=0.0)
    for step in range(0, tl.cdiv(depth, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        a_at = row.to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_column
        a = tl.load(a_ptr + a_at, mask=row_ok & (k < depth)[None, :], other=0.0)
        b_at = k.to(tl.int64)[:, None] * columns + col[None, :]
        b = tl.load(b_ptr + b_at, mask=(k < depth)[:, None] & col_ok, other=0.0)
        total = dot(a, b, total, INTERPRETED)
    tl.store(target, total, mask=row_ok & col_ok)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, scale_ptr, x_ptr, weight_ptr, grad_x_ptr, part_ptr, rows, hidden_size, eps,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With g = grad · scale, r = 1/sqrt(mean x² + eps), u = g w: dx = r u - r³ x mean(u x); dw = Σ g r x over rows."""
    column = tl.arange(0, BLOCK)
    ok = column < hidden_size
    wait_for_inputs(PDL)
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offset = (tl.zeros((BLOCK,), tl.int64) + row) * hidden_size + column
        x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32) * tl.load(scale_ptr + row)
        inverse = tl.rsqrt(tl.sum(x * x, axis=0) / hidden_size + eps)
        scaled = grad * weight
        shared = inverse * inverse * inverse * (tl.sum(scaled * x, axis=0) / hidden_size)
        tl.store(grad_x_ptr + offset, (inverse * scaled - shared * x).to(grad_x_ptr.dtype.element_ty), mask=ok)
        grad_weight += grad * inverse * x
    tl.store(part_ptr + tl.program_id(0).to(tl.int64) * hidden_size + column, grad_weight, mask=ok)


def _tile(like: Tensor, rows: int, columns: int) -> dict[str, Any]:
    """The tile of a product; smaller for fp32, which uses no tensor cores, and for strides not a multiple of 16."""
    slow = like.dtype == torch.float32 or like.stride(0) % 16 != 0
    most_rows, most_columns = (32, 32) if slow else (128, 128)
    return {
        "rows": min(most_rows, power_of_two(rows, 16)), "BLOCK_N": min(most_columns, power_of_two(columns, 16)),
        "BLOCK_K": 32 if slow else 64, "INTERPRETED": INTERPRETED, "num_warps": 4 if slow else 8,
        "num_stages": 2 if slow else 3,
        **launch_options(like),
    }  # fmt: skip


def _row_tile(normed: Tensor, rows: int, columns: int) -> dict[str, Any]:
    tile = _tile(normed, rows, columns)
    return {"ROWS": tile.pop("rows"), "EVEN": normed.shape[1] % tile["BLOCK_K"] == 0, **tile}


def _spans(size: int, step: int) -> Iterator[range]:
    return (range(begin, min(begin + step, size)) for begin in range(0, size, step))


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``total``, fp32; ``b`` and ``total`` are contiguous."""
    tile = _tile(b, *total.shape)
    block_m = tile.pop("rows")
    grid = (triton.cdiv(total.shape[0], block_m), triton.cdiv(total.shape[1], tile["BLOCK_N"]))
    accumulate_kernel[grid](a, b, total, *total.shape, a.shape[1], a.stride(0), a.stride(1), BLOCK_M=block_m, **tile)


def _softmax(normed: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [N R] of every row, and its label's logit: NaN if the label is outside the vocabulary."""
    rows, hidden_size = normed.shape
    tile = _row_tile(normed, rows, head.shape[0])
    groups = triton.cdiv(head.shape[0], tile["BLOCK_N"] * GROUP)
    peak, mass = (normed.new_empty(rows, groups, dtype=torch.float32) for _ in range(2))
    own = normed.new_full((rows,), float("nan"), dtype=torch.float32)
    lse = torch.empty_like(own)
    early_exit_loss_kernel[(triton.cdiv(rows, tile["ROWS"]), groups)](
        normed, head, labels, peak, mass, own, rows, labels.shape[0], head.shape[0], hidden_size, GROUP=GROUP, **tile
    )
    early_exit_loss_finish_kernel[(triton.cdiv(rows, 128),)](
        peak, mass, lse, rows, groups, BLOCK=128, **launch_options(normed)
    )
    return lse, own


def _slopes(
    normed: Tensor, head: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, buffer: Tensor, rows: range, cols: range
) -> Tensor:
    """Write the slopes of a range of rows and of tokens to ``buffer``."""
    slope, tile = buffer[: len(rows), : len(cols)], _row_tile(normed, len(rows), len(cols))
    grid = (triton.cdiv(len(rows), tile["ROWS"]), triton.cdiv(len(cols), tile["BLOCK_N"]))
    softmax_slope_kernel[grid](
        normed, head, labels, lse, scale, slope, rows.start, rows.stop, cols.start, cols.stop, labels.shape[0],
        normed.shape[1], buffer.stride(0), **tile,
    )  # fmt: skip
    return slope


def _gradients(
    normed: Tensor, head: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ scale · CE: of the normed rows, fp32 [N R, D], and, if ``factor`` is given, of the head [V, D]."""
    (rows, hidden_size), vocab_size = normed.shape, head.shape[0]
    grad = torch.zeros_like(normed, dtype=torch.float32)
    grad_head = head.new_empty(0) if factor is None else torch.empty_like(head)
    stride = triton.cdiv(min(vocab_size, VOCABULARY_AT_ONCE), 16) * 16
    buffer = normed.new_empty(min(rows, ROWS_AT_ONCE), stride)
    for cols in _spans(vocab_size, VOCABULARY_AT_ONCE):
        strip = slice(cols.start, cols.stop)
        part = head.new_zeros(len(cols), hidden_size, dtype=torch.float32)
        for some in _spans(rows, ROWS_AT_ONCE):
            slope = _slopes(normed, head, labels, lse, scale, buffer, some, cols)
            _accumulate(grad[some.start : some.stop], slope, head[strip])
            if factor is not None:
                _accumulate(part, slope.T, normed[some.start : some.stop])
        if factor is not None:
            grad_head[strip] = part.mul_(factor)
    return grad, grad_head


def _norm_backward(grad: Tensor, scale: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the norm's input and weight from the gradient ``grad · scale`` of its output."""
    rows, hidden_size = x.shape
    programs = min(rows, PROGRAMS)
    grad_x, part = torch.empty_like(x), x.new_empty(programs, hidden_size, dtype=torch.float32)
    rms_norm_backward_kernel[(programs,)](
        grad, scale, x, weight, grad_x, part, rows, hidden_size, eps, BLOCK=power_of_two(hidden_size),
        num_warps=min(16, max(4, hidden_size // 512)), **launch_options(x),
    )  # fmt: skip
    return grad_x, part.sum(0).to(weight.dtype)


def early_exit_loss(
    hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor, eps: float = 1e-5,
    ignore_index: int = -100, with_slope: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """On a GPU a label outside the vocabulary makes the loss NaN."""
    check_labels(labels, head_weight.shape[0], ignore_index)
    exits, rows, hidden_size = hiddens.shape
    labels = labels.contiguous()
    valid, count = label_counts(labels, ignore_index)
    if not exits * rows:
        exit_losses = hiddens.new_zeros(exits, dtype=torch.float32)
        return exit_losses.sum(), exit_losses, exit_losses.new_empty(exits, rows), torch.empty_like(hiddens)
    with on(hiddens):
        normed = rms_norm(hiddens.reshape(-1, hidden_size), norm_weight, eps)
        lse, own = _softmax(normed, head_weight, labels)
        slope = hiddens.new_empty(0)
        if with_slope:
            slope = _gradients(normed, head_weight, labels, lse, torch.ones_like(lse))[0]
            slope = slope.view(hiddens.shape).to(hiddens.dtype)
    exit_losses = torch.where(valid, (lse - own).view(exits, rows), 0).sum(1) / count
    return (exit_losses * exit_weights).sum(), exit_losses, lse.view(exits, rows), slope


def early_exit_loss_backward(
    grad: Tensor, hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor,
    logsumexp: Tensor, slope: Tensor, eps: float, ignore_index: int, head_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With ``slope``, and no gradient of the head, no pass over the head is needed."""
    exits, rows, hidden_size = hiddens.shape
    valid, count = label_counts(labels, ignore_index)
    scale = ((grad * exit_weights / count)[:, None] * valid).float().flatten()  # [N R]
    if not exits * rows:
        none = torch.zeros_like(head_weight) if head_grad else head_weight.new_empty(0)
        return torch.zeros_like(hiddens), torch.zeros_like(norm_weight), none
    x, norm_weight = hiddens.reshape(-1, hidden_size).contiguous(), norm_weight.contiguous()
    grad_head = head_weight.new_empty(0)
    with on(hiddens):
        if head_grad or slope.numel() == 0:
            largest = scale.abs().max()
            relative = scale / torch.where(largest > 0, largest, 1)
            flat = (labels.contiguous(), logsumexp.contiguous().flatten(), relative)
            normed = rms_norm(x, norm_weight, eps)
            grad_normed, grad_head = _gradients(normed, head_weight, *flat, largest if head_grad else None)
            scale = largest.expand_as(scale).contiguous()
        else:
            grad_normed = slope.contiguous().view(-1, hidden_size)
        grad_hiddens, grad_norm = _norm_backward(grad_normed, scale, x, norm_weight, eps)
    return grad_hiddens.view(hiddens.shape), grad_norm, grad_head
