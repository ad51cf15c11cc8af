"""`early_exit_loss` on the CPU: tiles of the vocabulary times chunks of rows, through torch's own matmuls.

A tile of logits lives in one pair of buffers; each row keeps its running maximum m, the sum s of exp(logit - m), and,
where only the states need a gradient, the sum of exp(logit - m) times the head's rows, rescaled when m grows. That sum
over s, less the label's row, is the gradient of the row's cross-entropy, so a frozen head is read once, not twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import check_labels, label_counts, rms_norm_gradients, rms_norm_ref

ROWS, VOCABULARY = 512, 2048  # a tile's fp32 logits, 4 MB, and their 16-bit copy stay in the last-level cache


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))


class _Tile:
    """One tile's buffers, and the products that fill them; ``narrow`` is in the input's dtype, ``wide`` accumulates."""

    def __init__(self, normed: Tensor, head: Tensor) -> None:
        size = min(ROWS, normed.shape[0]) * min(VOCABULARY, head.shape[0])
        self.wide = normed.new_empty(size, dtype=_wide_dtype(normed.dtype))
        self.same = normed.dtype == self.wide.dtype
        self.narrow = self.wide if self.same else normed.new_empty(size)

    def logits(self, normed: Tensor, head: Tensor) -> Tensor:
        """normed headᵀ, [rows, tokens]; 16-bit products come back rounded, as torch's do."""
        rows, tokens = normed.shape[0], head.shape[0]
        return torch.mm(normed, head.T, out=self.narrow[: rows * tokens].view(rows, tokens))

    def exp(self, logits: Tensor, shift: Tensor) -> Tensor:
        """exp(logits - shift) in the wide buffer, [rows, tokens]."""
        wide = self.wide[: logits.numel()].view_as(logits)
        return torch.sub(logits, shift[:, None], out=wide).exp_()

    def rounded(self, wide: Tensor) -> Tensor:
        """The wide tile in the dtype that the products take."""
        return wide if self.same else self.narrow[: wide.numel()].view_as(wide).copy_(wide)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, which is wide."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _Softmax:
    """Running log-sum-exp of every row over vocabulary tiles, with the label's logit and, on request, the slope."""

    def __init__(self, normed: Tensor, head: Tensor, labels: Tensor, with_slope: bool) -> None:
        self.normed, self.head, self.labels = normed, head, labels  # [N R, D], [V, D], [N R]
        wide = _wide_dtype(normed.dtype)
        self.top = normed.new_full(labels.shape, float("-inf"), dtype=wide)
        self.sum, self.label_logit = torch.zeros_like(self.top), torch.zeros_like(self.top)
        self.slope = torch.zeros_like(normed, dtype=wide) if with_slope else None
        tile = _Tile(normed, head)
        for tokens in _spans(head.shape[0], VOCABULARY):
            for rows in _spans(normed.shape[0], ROWS):
                self._visit(tile, rows, tokens)

    def _visit(self, tile: _Tile, rows: slice, tokens: slice) -> None:
        head = self.head[tokens]
        logits = tile.logits(self.normed[rows], head)
        local = self.labels[rows] - tokens.start
        here = (local >= 0) & (local < head.shape[0])
        own = logits.gather(1, local.clamp(0, head.shape[0] - 1)[:, None])[:, 0]
        self.label_logit[rows] = torch.where(here, own.to(self.top.dtype), self.label_logit[rows])
        top = torch.maximum(self.top[rows], logits.amax(1).to(self.top.dtype))
        shrink = (self.top[rows] - top).exp_()
        terms = tile.exp(logits, top)
        self.sum[rows] = self.sum[rows] * shrink + terms.sum(1)
        self.top[rows] = top
        if self.slope is not None:
            self.slope[rows] *= shrink[:, None]
            _accumulate(self.slope[rows], tile.rounded(terms), head)

    def logsumexp(self) -> Tensor:
        return self.top + self.sum.log()


def _normed_rows(hiddens: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    return rms_norm_ref(hiddens.reshape(-1, hiddens.shape[2]), norm_weight, eps)


def early_exit_loss_cpu(
    hiddens: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    exit_weights: Tensor,
    eps: float = 1e-5,
    ignore_index: int = -100,
    with_slope: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward; see `layerskip_kernels.early_exit_loss`."""
    check_labels(labels, head_weight.shape[0], ignore_index)
    exits, rows, width = hiddens.shape
    normed = _normed_rows(hiddens, norm_weight, eps)
    softmax = _Softmax(normed, head_weight, labels.repeat(exits), with_slope)
    logsumexp = softmax.logsumexp()
    valid, count = label_counts(labels, ignore_index)
    entropy = (logsumexp - softmax.label_logit).view(exits, rows)
    exit_losses = torch.where(valid, entropy, 0).sum(1) / count
    slope = hiddens.new_empty(0)
    if softmax.slope is not None:
        slope = softmax.slope.div_(softmax.sum[:, None]).view(exits, rows, width)
        slope = slope.sub_(head_weight[labels.clamp(0)]).to(hiddens.dtype)
    loss = (exit_losses * exit_weights).sum()
    return loss, exit_losses, logsumexp.view(exits, rows), slope


def _recompute(
    normed: Tensor, head: Tensor, labels: Tensor, scale: Tensor, logsumexp: Tensor, head_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ scale · CE to the normed rows [N R, D], wide, and to the head [V, D]."""
    grad = torch.zeros_like(normed, dtype=_wide_dtype(normed.dtype))
    grad_head = torch.empty_like(head) if head_grad else head.new_empty(0)
    tile = _Tile(normed, head)
    for tokens in _spans(head.shape[0], VOCABULARY):
        part = torch.zeros_like(head[tokens], dtype=grad.dtype) if head_grad else None
        for rows in _spans(normed.shape[0], ROWS):
            own, scaled = normed[rows], scale[rows]
            slopes = tile.exp(tile.logits(own, head[tokens]), logsumexp[rows]).mul_(scaled[:, None])
            local = labels[rows] - tokens.start
            here = ((local >= 0) & (local < slopes.shape[1])).nonzero()[:, 0]
            slopes[here, local[here]] -= scaled[here]
            rounded = tile.rounded(slopes)
            _accumulate(grad[rows], rounded, head[tokens])
            if part is not None:
                _accumulate(part, rounded.T, own)
        if part is not None:
            grad_head[tokens] = part
    return grad, grad_head


def early_exit_loss_backward_cpu(
    grad: Tensor,
    hiddens: Tensor,
    norm_weight: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    exit_weights: Tensor,
    logsumexp: Tensor,
    slope: Tensor,
    eps: float,
    ignore_index: int,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's backward; ``slope`` spares the pass over the head where the head needs no gradient."""
    exits = hiddens.shape[0]
    valid, count = label_counts(labels, ignore_index)
    scale = (grad * exit_weights.to(grad.dtype) / count)[:, None] * valid  # [N, R]
    if head_grad or slope.numel() == 0:
        normed = _normed_rows(hiddens, norm_weight, eps)
        flat = (labels.repeat(exits), scale.reshape(-1), logsumexp.reshape(-1))
        grad_normed, grad_head = _recompute(normed, head_weight, *flat, head_grad)
        grad_normed = grad_normed.view_as(hiddens)
    else:
        grad_normed, grad_head = slope * scale[:, :, None], head_weight.new_empty(0)
    grad_hiddens, grad_norm = rms_norm_gradients(grad_normed, hiddens, norm_weight, eps)
    return grad_hiddens, grad_norm, grad_head
