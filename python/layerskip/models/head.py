"""The head, which every early exit shares with the full model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerskip_kernels import ExitOutput, Head, LayerWeights, exit_head
from layerskip_kernels.formats import format_of, is_packed, lookup


def shared(weight: Tensor) -> nn.Parameter:
    """Wrap ``weight`` in a Parameter on the same storage; return a Parameter as it is."""
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def reject_gradient(hidden: Tensor) -> None:
    """Raise if a gradient is required: the fused ops have none, and silently nothing would be trained."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError("this module has no backward; call it under torch.no_grad(), or detach its input")


class ExitWeights(NamedTuple):
    """An exit in the dtype and on the device of a model: ``head`` has its norm, ``draft_layers`` run before it.

    ``exit_layer`` is None for a head alone, which may follow any layer. Matrices of draft layers may be packed.
    """

    exit_layer: int | None
    head: EarlyExitHead
    draft_layers: tuple[LayerWeights, ...] = ()


class NormSpec(NamedTuple):
    """A final norm that is stored differently: the op's weight is (``offset`` + stored) · ``scale``."""

    offset: float
    scale: float

    def apply(self, kept: Tensor) -> Tensor:
        return ((kept.float() + self.offset) * self.scale).to(kept.dtype)


_QUANTIZE_ROWS = 8192  # rows that are converted to fp32 at a time
_INT8_MAX = 127


class EarlyExitHead(nn.Module):
    """Final norm, head, arg-max and log-sum-exp for the state after any layer; no logits are written.

    The given tensors are kept, not copied, so storage is shared with the model that they come from.

    Parameters
    ----------
    norm_weight : Tensor [D]
    head_weight : Tensor [V, D]
        In the dtype of ``norm_weight``, packed (`layerskip_kernels.formats`), or int8 together with ``scale``.
    eps : float
    token_map : Tensor [V], int64, optional
        The token of each row; by default its index.
    scale : Tensor [V], fp32, optional
        One factor a row of an int8 head.
    norm_spec : NormSpec, optional
        If ``norm_weight`` is not the op's weight, which then is a tensor of its own, see `refresh`.
    """

    token_map: Tensor | None
    scale: Tensor | None
    norm_weight: Tensor

    def __init__(
        self,
        norm_weight: Tensor,
        head_weight: Tensor,
        eps: float,
        token_map: Tensor | None = None,
        scale: Tensor | None = None,
        norm_spec: NormSpec | None = None,
    ) -> None:
        super().__init__()
        packed = head_weight.dim() == 2 and is_packed(head_weight)
        if packed:
            format_of(head_weight, norm_weight.shape[0])
        elif head_weight.dim() != 2 or norm_weight.shape != head_weight.shape[1:]:
            raise ValueError(
                f"norm_weight has shape {list(norm_weight.shape)}, head_weight {list(head_weight.shape)}; "
                "expected [D] and [V, D]"
            )
        self.norm_spec = norm_spec
        if norm_spec is None:
            self.norm_weight = shared(norm_weight)
        else:
            self.norm_kept = shared(norm_weight)
            with torch.inference_mode(False), torch.no_grad():  # `refresh` writes to it in any mode
                self.register_buffer("norm_weight", norm_spec.apply(norm_weight), persistent=False)
            self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())
        self.head_weight = shared(head_weight)
        self.eps = float(eps)
        self.register_buffer("token_map", token_map)
        self.register_buffer("scale", scale)

    @property
    def num_rows(self) -> int:
        return self.head_weight.shape[0]

    @property
    def kept_norm(self) -> Tensor:
        """The parameter of the norm."""
        return self.norm_weight if self.norm_spec is None else self.norm_kept

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the norm's weight if it is derived from the parameter."""
        if self.norm_spec is None:
            return
        weight = self.norm_spec.apply(self.norm_kept)
        if (weight.dtype, weight.device) == (self.norm_weight.dtype, self.norm_weight.device):
            self.norm_weight.copy_(weight)
        else:
            self.norm_weight = weight

    @property
    def weights(self) -> Head:
        """The tensors as the ops take them."""
        return Head(self.norm_weight, self.head_weight, self.token_map, self.scale)

    def forward(
        self,
        hidden: Tensor,
        temperature: Tensor | None = None,
        seed: Tensor | None = None,
        offset: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> ExitOutput:
        """Compute the token that the model would emit if it ended after this layer.

        Parameters
        ----------
        hidden : Tensor [..., D]
            Raw state after a layer, not yet normed. ValueError if it requires a gradient: the head has no backward.
        temperature : Tensor [R], fp32, optional
            Of each of the R rows; 0 is greedy.
        seed, offset : Tensor [R], int64
            Determine the noise; required with a temperature.
        logits : Tensor [R, V], fp32, optional
            Receives the raw logits.

        Returns
        -------
        ExitOutput
            Fields of shape [...].
        """
        reject_gradient(hidden)
        leading = hidden.shape[:-1]
        with torch.no_grad():
            out = exit_head(
                hidden.reshape(-1, hidden.shape[-1]), self.norm_weight, self.head_weight, self.eps, self.token_map,
                self.scale, temperature, seed, offset, logits,
            )  # fmt: skip
        return out if len(leading) == 1 else ExitOutput(*(field.view(leading) for field in out))

    @torch.no_grad()
    def quantize(self, token_ids: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None) -> EarlyExitHead:
        """Make an approximate copy for drafting: symmetric int8, with the scale max|w| / 127 for each row.

        Parameters
        ----------
        token_ids : Tensor [N], int64, optional
            Score only these tokens: sorted, each once.
        low_rank : (Tensor [r, D], Tensor [V, r]), optional
            Quantize ``head_weight + second @ first``.

        Returns
        -------
        EarlyExitHead
            Shares the norm.

        Raises
        ------
        ValueError
            If the head is quantized or reduced already, ``token_ids`` is not sorted, unique and within the vocabulary,
            or a row holds NaN or infinity.
        """
        if self.scale is not None or self.token_map is not None:
            raise ValueError("this head is quantised or reduced already; quantize the full head")
        if token_ids is not None:
            check_token_ids(token_ids, self.num_rows)
            token_ids = token_ids.to(self.head_weight.device, copy=True)
        ids = torch.arange(self.num_rows, device=self.head_weight.device) if token_ids is None else token_ids
        rows = ids.numel()
        width = self.norm_weight.shape[0]
        quantised = self.head_weight.new_empty((rows, width), dtype=torch.int8)
        scale = self.head_weight.new_empty(rows, dtype=torch.float32)
        for first in range(0, rows, _QUANTIZE_ROWS):
            part = slice(first, first + _QUANTIZE_ROWS)
            weight = lookup(self.head_weight, ids[part], width, torch.float32).float()
            if low_rank is not None:
                weight = weight + low_rank[1][ids[part]].float() @ low_rank[0].float()
            quantised[part], scale[part] = _quantize_rows(weight, first)
        return EarlyExitHead(self.norm_weight, quantised, self.eps, token_ids, scale)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> EarlyExitHead:
        """Convert the module except for the scales, which the op takes in fp32."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None:
            self.scale = scale.to(self.norm_weight.device)
        return self


def check_token_ids(token_ids: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless token ids are sorted, unique and within the vocabulary."""
    if token_ids.dtype != torch.int64 or token_ids.dim() != 1 or token_ids.numel() == 0:
        raise ValueError(f"token_ids must be a non-empty int64 vector, got {token_ids.dtype} {list(token_ids.shape)}")
    if bool((token_ids[1:] <= token_ids[:-1]).any()):
        raise ValueError("token_ids must be sorted and hold each token once")
    first, last = int(token_ids[0]), int(token_ids[-1])
    if first < 0 or last >= vocabulary:
        raise ValueError(f"token id {first if first < 0 else last} is outside the vocabulary of {vocabulary}")


def _quantize_rows(weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Int8 rows and scales of fp32 rows [N, D]; ``first`` is the number of the first row, for the message."""
    largest = weight.abs().amax(1)
    broken = (~largest.isfinite()).nonzero()
    if broken.numel():
        raise ValueError(f"row {first + int(broken[0])} of the head weight to quantise holds NaN or infinity")
    scale = largest / _INT8_MAX
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays one
    return (weight / scale[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale
