"""`early_exit_loss` on the CPU: tiles of the vocabulary times chunks of rows, by torch's own matmuls.

One native pass (csrc/cpu/early_exit_loss.cpp) turns a tile of logits, in place, into the operand of the next product;
in float64, or without the native library, torch does it through a second, wide buffer. Each row keeps a shift m, the
sum s of exp(logit - m) and, if only the states need a gradient, the sum of exp(logit - m) times the head's rows. That
sum over s, minus the label's row, is the gradient of the row's cross-entropy: a frozen head is read once, not twice. m
moves, which rescales the sums, only when a logit exceeds it by more than `SLACK`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _extension
from .dispatch import implements, serves_device
from .reference import check_labels, label_counts, rms_norm_gradients, rms_norm_ref
from .schemas import native_ops

# Rows and tokens of a forward tile, whose 2 MB of fp32 logits stay in the cache. The head's gradient goes by strips of
# tokens for all rows: as many as fit in 2 MB, or at least 128.
FORWARD_TILE = (256, 2048)
STRIP_SIZE, STRIP_TOKENS = 2**19, 128
NORM_ROWS = 64  # rows normed at once: a norm has several wide intermediates
SLACK = 10.0  # sums times exp(10) are exact and far from overflow; fp16, whose products overflow, uses 0


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))


class _Tile:
    """The buffers that all tiles share: ``narrow`` in the input's dtype, ``wide`` in fp32 or float64 for torch."""

    def __init__(self, normed: Tensor, head: Tensor, shape: tuple[int, int]) -> None:
        size = min(shape[0], normed.shape[0]) * min(shape[1], head.shape[0])
        self.native = _extension.cpu_reason is None and normed.dtype != torch.float64
        self.same = normed.dtype == _wide_dtype(normed.dtype)
        self.narrow = normed.new_empty(size)
        self.wide = (
            self.narrow
            if self.same
            else self.narrow.new_empty(0 if self.native else size, dtype=_wide_dtype(normed.dtype))
        )

    def logits(self, normed: Tensor, head: Tensor) -> Tensor:
        """normed headᵀ, [rows, tokens], in the input's dtype."""
        rows, tokens = normed.shape[0], head.shape[0]
        return torch.mm(normed, head.T, out=self.narrow[: rows * tokens].view(rows, tokens))

    def exp(self, logits: Tensor, shift: Tensor) -> Tensor:
        """exp(logits - shift) in the wide buffer, [rows, tokens]."""
        wide = self.wide[: logits.numel()].view_as(logits)
        return torch.sub(logits, shift[:, None], out=wide).exp_()

    def rounded(self, wide: Tensor) -> Tensor:
        """The wide tile in the input's dtype."""
        return wide if self.same else self.narrow[: wide.numel()].view_as(wide).copy_(wide)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, which is wide."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _Softmax:
    """Sums of every row over vocabulary tiles, the label's logit and, with ``with_slope``, the slope."""

    def __init__(self, normed: Tensor, head: Tensor, labels: Tensor, with_slope: bool) -> None:
        self.normed, self.head, self.labels = normed, head, labels  # [N R, D], [V, D], [N R]
        wide = _wide_dtype(normed.dtype)
        self.shift = normed.new_full(labels.shape, float("-inf"), dtype=wide)
        self.sum, self.label_logit = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        self.slope = torch.zeros_like(normed, dtype=wide) if with_slope else None
        self.slack = 0.0 if normed.dtype == torch.float16 else SLACK
        tile = _Tile(normed, head, FORWARD_TILE)
        for tokens in _spans(head.shape[0], FORWARD_TILE[1]):
            for rows in _spans(normed.shape[0], FORWARD_TILE[0]):
                self._visit(tile, rows, tokens)

    def _visit(self, tile: _Tile, rows: slice, tokens: slice) -> None:
        head = self.head[tokens]
        logits = tile.logits(self.normed[rows], head)
        terms = self._native_terms(logits, rows, tokens) if tile.native else self._terms(tile, logits, rows, tokens)
        if self.slope is not None:
            _accumulate(self.slope[rows], terms, head)

    def _native_terms(self, logits: Tensor, rows: slice, tokens: slice) -> Tensor:
        slope = None if self.slope is None else self.slope[rows]
        native_ops.loss_terms(
            logits, self.labels[rows], tokens.start, self.slack, self.shift[rows], self.sum[rows],
            self.label_logit[rows], slope,
        )  # fmt: skip
        return logits

    def _terms(self, tile: _Tile, logits: Tensor, rows: slice, tokens: slice) -> Tensor:
        self._keep_label(logits, rows, tokens)
        self._raise_shift(logits.amax(1).to(self.shift.dtype), rows)
        terms = tile.exp(logits, self.shift[rows])
        self.sum[rows] += terms.sum(1)
        return tile.rounded(terms)

    def _keep_label(self, logits: Tensor, rows: slice, tokens: slice) -> None:
        """Store the logits of the labels that are in the tile."""
        local = self.labels[rows] - tokens.start
        here = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
        self.label_logit[rows][here] = logits[here, local[here]].to(self.shift.dtype)

    def _raise_shift(self, top: Tensor, rows: slice) -> None:
        """Raise the shift of rows whose largest logit ``top`` exceeds it by more than the slack; rescale their sums."""
        high = (top > self.shift[rows] + self.slack).nonzero()[:, 0]
        if high.numel():
            shrink = (self.shift[rows][high] - top[high]).exp_()
            self.shift[rows][high] = top[high]
            self.sum[rows][high] *= shrink
            if self.slope is not None:
                self.slope[rows][high] *= shrink[:, None]

    def logsumexp(self) -> Tensor:
        """[N R]."""
        return self.shift + self.sum.log()

    def slopes(self) -> Tensor:
        """Gradient of each row's cross-entropy to its normed state, [N R, D]; for rows without a label, too."""
        assert self.slope is not None
        for rows in _spans(self.slope.shape[0], NORM_ROWS):
            self.slope[rows] /= self.sum[rows, None]
            self.slope[rows] -= self.head[self.labels[rows].clamp(0)]
        return self.slope.to(self.normed.dtype)


def _normed_rows(hiddens: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """The normed states, [N R, D]."""
    flat = hiddens.reshape(-1, hiddens.shape[2])
    normed = torch.empty_like(flat)
    for rows in _spans(flat.shape[0], NORM_ROWS):
        normed[rows] = rms_norm_ref(flat[rows], norm_weight, eps)
    return normed


@implements("early_exit_loss", "cpu", serves_device("cpu"))
def early_exit_loss_cpu(
    hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor, eps: float = 1e-5,
    ignore_index: int = -100, with_slope: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_labels(labels, head_weight.shape[0], ignore_index)
    exits, rows, _ = hiddens.shape
    normed = _normed_rows(hiddens, norm_weight, eps)
    softmax = _Softmax(normed, head_weight, labels.repeat(exits), with_slope)
    logsumexp = softmax.logsumexp()
    valid, count = label_counts(labels, ignore_index)
    entropy = (logsumexp - softmax.label_logit).view(exits, rows)
    exit_losses = torch.where(valid, entropy, 0).sum(1) / count
    slope = softmax.slopes().view_as(hiddens) if with_slope else hiddens.new_empty(0)
    loss = (exit_losses * exit_weights).sum()
    return loss, exit_losses, logsumexp.view(exits, rows), slope


def _head_gradient(normed: Tensor, head: Tensor, labels: Tensor, scale: Tensor, logsumexp: Tensor) -> Tensor:
    """Gradient of Σ scale · CE to the head, [V, D]; each strip of tokens takes all rows at once, so it needs no sum."""
    grad_head = torch.empty_like(head)
    strip = max(STRIP_TOKENS, STRIP_SIZE // max(normed.shape[0], 1))
    tile = _Tile(normed, head, (normed.shape[0], strip))
    for tokens in _spans(head.shape[0], strip):
        logits = tile.logits(normed, head[tokens])
        if tile.native:
            native_ops.loss_slopes(logits, labels, tokens.start, logsumexp, scale)
            slopes = logits
        else:
            slopes = _slopes(tile, logits, labels - tokens.start, logsumexp, scale)
        torch.mm(slopes.T, normed, out=grad_head[tokens])
    return grad_head


def _slopes(tile: _Tile, logits: Tensor, local: Tensor, logsumexp: Tensor, scale: Tensor) -> Tensor:
    """scale · (softmax - one-hot) of a tile in which the labels have the columns ``local``, in torch."""
    slopes = tile.exp(logits, logsumexp).mul_(scale[:, None])
    here = ((local >= 0) & (local < slopes.shape[1])).nonzero()[:, 0]
    slopes[here, local[here]] -= scale[here]
    return tile.rounded(slopes)


@implements("early_exit_loss_backward", "cpu", serves_device("cpu"))
def early_exit_loss_backward_cpu(
    grad: Tensor, hiddens: Tensor, norm_weight: Tensor, head_weight: Tensor, labels: Tensor, exit_weights: Tensor,
    logsumexp: Tensor, slope: Tensor, eps: float, ignore_index: int, head_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With ``slope`` the states' gradients need no products."""
    exits = hiddens.shape[0]
    valid, count = label_counts(labels, ignore_index)
    scale = ((grad * exit_weights.to(grad.dtype) / count)[:, None] * valid).reshape(-1)  # [N R]
    labels = labels.repeat(exits)
    if head_grad or slope.numel() == 0:
        normed = _normed_rows(hiddens, norm_weight, eps)
    if slope.numel() == 0:
        slope = _Softmax(normed, head_weight, labels, with_slope=True).slopes()
    grad_head = head_weight.new_empty(0)
    if head_grad:
        grad_head = _head_gradient(normed, head_weight, labels, scale, logsumexp.reshape(-1))
    flat = slope.view(-1, hiddens.shape[2])
    grad_hiddens, grad_norm = _norm_backward(flat, scale, hiddens, norm_weight, eps)
    return grad_hiddens, grad_norm, grad_head


def _norm_backward(
    slope: Tensor, scale: Tensor, hiddens: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients through the norm of slope · scale [N R, D], by chunks."""
    flat = hiddens.reshape(-1, hiddens.shape[2])
    grad = torch.empty_like(flat)
    grad_norm = torch.zeros_like(norm_weight, dtype=scale.dtype)
    wide_weight = norm_weight.to(scale.dtype)  # for a wide sum over chunks
    for rows in _spans(flat.shape[0], NORM_ROWS):
        grad[rows], part = rms_norm_gradients(slope[rows] * scale[rows, None], flat[rows], wide_weight, eps)
        grad_norm += part
    return grad.view_as(hiddens), grad_norm.to(norm_weight.dtype)
