"""An exit that can be trained: blocks after layer E of a frozen model, a norm, a low-rank correction of the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip_kernels import LayerWeights

from ..models import LayerSkipModel
from ..models.exit import Exit
from ._seeds import generator
from .kept import Text


class Packed(NamedTuple):
    """Texts one behind the other, without padding.

    ``states`` [N, D] after layer E, ``lengths`` of the texts, of which rows ``firsts`` and later have labels.
    """

    states: Tensor
    lengths: list[int]
    firsts: list[int]

    @classmethod
    def of(cls, texts: Sequence[Text], device: torch.device, dtype: torch.dtype) -> Packed:
        """Some texts, on a device."""
        states = torch.cat([text.states for text in texts]).to(device, dtype)
        return cls(states, [len(text.states) for text in texts], [text.first for text in texts])


class Geometry(NamedTuple):
    """What a block needs beside its weights: the head size C, the norms' eps, rotary tables [≥ T, C/2] fp32."""

    head_dim: int
    eps: float
    cos: Tensor
    sin: Tensor


class Block(nn.Module):
    """One decoder layer, as `layerskip_kernels.partial_forward` defines it, with a gradient, on packed texts."""

    def __init__(self, weights: LayerWeights) -> None:
        super().__init__()
        for name, weight in weights._asdict().items():
            copied = None if weight is None else nn.Parameter(weight.detach().float().clone())
            self.register_parameter(name, copied)

    def weights(self) -> LayerWeights:
        """The parameters, by reference."""
        return LayerWeights(*(getattr(self, name) for name in LayerWeights._fields))

    def copies(self, dtype: torch.dtype) -> LayerWeights:
        """Copies of the parameters, on the CPU."""
        named = {name: weight for name, weight in self.weights()._asdict().items() if weight is not None}
        return LayerWeights(**{name: _copy(weight, dtype) for name, weight in named.items()})

    def forward(self, packed: Packed, geometry: Geometry, labelled_only: bool) -> Tensor:
        """The states after the block.

        Parameters
        ----------
        packed : Packed
        geometry : Geometry
        labelled_only : bool
            Compute only the labelled rows; the others serve as keys and values alone.

        Returns
        -------
        Tensor [R, D]
            Of the labelled rows, or of all.
        """
        firsts = packed.firsts if labelled_only else [0] * len(packed.firsts)
        head_dim, eps, device = geometry.head_dim, geometry.eps, packed.states.device
        begins = torch.tensor([0, *packed.lengths]).cumsum(0).tolist()
        places = [torch.arange(first, length) for first, length in zip(firsts, packed.lengths, strict=True)]
        rows = torch.cat([place + begin for place, begin in zip(places, begins, strict=False)]).to(device)
        positions = torch.cat([torch.arange(length) for length in packed.lengths]).to(device)
        cos, sin = geometry.cos[positions, None], geometry.sin[positions, None]

        w = self.weights()
        normed = F.rms_norm(packed.states, packed.states.shape[1:], w.attn_norm, eps)
        q = F.linear(normed[rows], w.q, w.q_bias).unflatten(1, (-1, head_dim))
        k = F.linear(normed, w.k, w.k_bias).unflatten(1, (-1, head_dim))
        v = F.linear(normed, w.v, w.v_bias).unflatten(1, (-1, head_dim))
        if w.q_norm is not None and w.k_norm is not None:
            q, k = F.rms_norm(q, (head_dim,), w.q_norm, eps), F.rms_norm(k, (head_dim,), w.k_norm, eps)
        q, k = _rotate(q, cos[rows], sin[rows]), _rotate(k, cos, sin)
        attended = _attend(q, k, v.to(k.dtype), begins, firsts)
        hidden = packed.states[rows] + F.linear(attended.flatten(1), w.o)
        normed = F.rms_norm(hidden, hidden.shape[1:], w.mlp_norm, eps)
        return hidden + F.linear(F.silu(F.linear(normed, w.gate)) * F.linear(normed, w.up), w.down)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x [N, heads, C], as `layerskip_kernels.rope_kv_append` has it."""
    one, two = x.float().chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, begins: Sequence[int], firsts: Sequence[int]) -> Tensor:
    """Causal attention within each text: q [R, H, C] of its rows ``first`` and later, k and v [N, G, C] of all."""
    outs, done = [], 0
    for begin, end, first in zip(begins[:-1], begins[1:], firsts, strict=True):
        length = end - begin
        queries, keys, values = (
            part.transpose(0, 1)[None] for part in (q[done : done + length - first], k[begin:end], v[begin:end])
        )
        mask = torch.ones(length - first, length, dtype=torch.bool, device=q.device).tril(first)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        done += length - first
    return torch.cat(outs)


class TrainableExit(nn.Module):
    """Blocks, norm and head correction with gradients; model and head stay what they are.

    Parameters
    ----------
    model : LayerSkipModel
        Nothing of it is trained, and the blocks are copies.
    exit_layer : int
        E.
    num_blocks : int
        n.
    init_layer : int
        The layer of the model that the blocks are copies of at first; the norm is a copy of the final one.
    token_ids : Tensor [S], int64, optional
        The tokens that are drafted: sorted, each once.
    head_rank : int
        r of the head's correction, which is zero at first; 0 for none.
    max_length : int
        The longest text.
    seed : int
        Of what a correction begins with.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        exit_layer: int,
        num_blocks: int,
        init_layer: int,
        token_ids: Tensor | None = None,
        head_rank: int = 0,
        max_length: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        decoder = model.decoder
        self.exit_layer, self.num_layers, self.vocab_size = exit_layer, model.num_layers, model.vocab_size
        self.blocks = nn.ModuleList(Block(decoder.template(init_layer)) for _ in range(num_blocks))
        self.norm_weight = nn.Parameter(model.head.norm_weight.detach().float().clone())
        self.token_ids = None if token_ids is None else token_ids.to(model.device)
        weight = model.head.head_weight.detach()
        self._head_rows = weight if self.token_ids is None else weight[self.token_ids]
        size, rows = weight.shape[1], len(self._head_rows)
        self.head_down = self.head_up = None
        if head_rank:
            down = torch.randn(head_rank, size, generator=generator("head correction", seed)) * size**-0.5
            self.head_down = nn.Parameter(down.to(model.device))
            self.head_up = nn.Parameter(torch.zeros(rows, head_rank, device=model.device))
        decoder.new_cache(1, max_length)  # the rotary tables grow to it
        self._geometry = Geometry(decoder.head_dim, decoder.eps, *decoder.rope_tables)

    @torch.no_grad()
    def begin_as(self, first: Exit) -> None:
        """Take the parameters of an exit of the same shape, whose tokens this one drafts.

        Raises
        ------
        ValueError
            If it has another layer, or other blocks.
        """
        mine, theirs = (self.exit_layer, len(self.blocks)), (first.exit_layer, first.num_blocks)
        if mine != theirs:
            raise ValueError(f"init_exit has layer and blocks {theirs}, the recipe has {mine}")
        if (first.head_down is None) != (self.head_down is None):
            raise ValueError("one of the recipe and init_exit has a correction of the head, the other has none")
        self.norm_weight.copy_(first.norm_weight)
        for block, weights in zip(self.blocks, first.blocks, strict=True):
            for name, weight in weights._asdict().items():
                if weight is not None:
                    getattr(block, name).copy_(weight)
        down, up = first.head_down, first.head_up
        if self.head_down is not None and self.head_up is not None and down is not None and up is not None:
            self.head_down.copy_(down)
            self.head_up.copy_(up if self.token_ids is None else up[self.token_ids.cpu()])

    @property
    def head_rows(self) -> Tensor:
        """The model's own head for the drafted tokens, [S, D]."""
        return self._head_rows

    def forward(self, packed: Packed) -> Tensor:
        """The normed states of the labelled rows, [R, D], which the head turns into logits."""
        for number, block in enumerate(self.blocks):
            last = number == len(self.blocks) - 1
            packed = packed._replace(states=block(packed, self._geometry, labelled_only=last))
        hidden = packed.states
        if not self.blocks:
            begins = torch.tensor([0, *packed.lengths]).cumsum(0).tolist()
            rows = [torch.arange(b + f, b + n) for b, f, n in zip(begins, packed.firsts, packed.lengths, strict=False)]
            hidden = hidden[torch.cat(rows).to(hidden.device)]
        return F.rms_norm(hidden, hidden.shape[1:], self.norm_weight, self._geometry.eps)

    def correction(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """What adds to the logits of normed states [R, D]: a [R, r] and b [S, r], of which a bᵀ counts; or None."""
        if self.head_down is None or self.head_up is None:
            return None
        return F.linear(hidden, self.head_down), self.head_up

    def exit(self, dtype: torch.dtype = torch.bfloat16) -> Exit:
        """A copy as it is used, in ``dtype``."""

        blocks = [block.copies(dtype) for block in self.blocks if isinstance(block, Block)]
        down = up = None
        if self.head_down is not None and self.head_up is not None:
            down, up = _copy(self.head_down, dtype), _copy(self.head_up, dtype)
            if self.token_ids is not None:
                up = up.new_zeros(self.vocab_size, up.shape[1]).index_copy_(0, self.token_ids.cpu(), up)
        ids = None if self.token_ids is None else self.token_ids.cpu()
        norm = _copy(self.norm_weight, dtype)
        return Exit(self.exit_layer, norm, self.num_layers, self.vocab_size, blocks, ids, down, up)
