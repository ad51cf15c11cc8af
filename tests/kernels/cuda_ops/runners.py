"""The CUDA kernels, emulated on the CPU or on a card, called as the public ops are.

A test that takes the fixture ``ops`` runs on both: emulated in every suite, on a card with the mark ``gpu``. Tensors
come from the CPU and go back to it; what an op writes in place is written in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels as lk
from tests.cuda_emulation import library

from .layers import EmulatedLayers

HEAD_TILE, CHOICE_WORDS = 16, 5  # of csrc/cuda/exit_head.h and choice.cuh
STRETCH, PICK_WORDS = 4096, 4  # of csrc/cuda/accept.cuh


def _void(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
    """Memory in which what a kernel forgets to write shows."""
    return torch.full(shape, float("nan") if like.is_floating_point else torch.iinfo(like).max, dtype=like)


class Emulated(EmulatedLayers):
    """The kernels under tests/cuda_emulation.

    Parameters
    ----------
    seed : int
        Of the order in which blocks and threads run.
    arch : {80, 90}
        The card that is emulated.
    """

    def __init__(self, seed: int = 0, arch: int = 90) -> None:
        self.seed, self.arch = seed, arch

    def call(self, file: str, entry: str, *args: Any, writes: list[Tensor]) -> None:
        library(file).call(entry, *args, writes=writes, seed=self.seed, arch=self.arch)

    def exit_head(
        self, hidden: Tensor, norm: Tensor, weight: Tensor, eps: float, token_map: Tensor | None = None,
        scale: Tensor | None = None, temperature: Tensor | None = None, seed: Tensor | None = None,
        offset: Tensor | None = None, logits: Tensor | None = None,
    ) -> lk.ExitOutput:  # fmt: skip
        rows, (vocabulary, width) = hidden.shape[0], weight.shape
        partial = _void(rows, -(-vocabulary // HEAD_TILE), CHOICE_WORDS)
        out = (_void(rows, like=torch.int64), _void(rows), _void(rows))
        pitch = 0 if logits is None else logits.stride(0)
        self.call(
            "exit_head", "exit_head", hidden, hidden.stride(0), norm, weight, float(eps), token_map, scale, temperature,
            seed, offset, logits, pitch, partial, *out, rows, vocabulary, width, hidden.dtype,
            writes=[partial, *out] + ([] if logits is None else [logits]),
        )  # fmt: skip
        return lk.ExitOutput(*out)

    def accept_greedy(self, draft: Tensor, target: Tensor, seq_lens: Tensor) -> lk.Acceptance:
        out = (_void(len(draft), like=torch.int64), _void(len(draft), like=torch.int64))
        self.call("accept", "accept_greedy", draft, target, seq_lens, *out, *draft.shape, writes=[seq_lens, *out])
        return lk.Acceptance(*out)

    def accept_sampled(
        self, draft: Tensor, draft_logits: Tensor, target_logits: Tensor, seq_lens: Tensor, temperature: Tensor,
        seed: Tensor, token_map: Tensor | None = None,
    ) -> lk.Acceptance:  # fmt: skip
        (batch, drafted), few, many = draft.shape, draft_logits.shape[-1], target_logits.shape[-1]
        stretches = -(-max(few, many) // STRETCH)
        out = (_void(batch, like=torch.int64), _void(batch, like=torch.int64))
        rows, picks = _void(batch, 2 * drafted + 1, stretches, CHOICE_WORDS), _void(batch, stretches, PICK_WORDS)
        inverse = None if token_map is None else _void(many, like=torch.int32)
        self.call(
            "accept", "accept_sampled", draft, draft_logits, target_logits, seq_lens, temperature, seed, token_map,
            *out, rows, picks, inverse, batch, drafted, few, many,
            writes=[seq_lens, *out, rows, picks] + ([] if inverse is None else [inverse]),
        )  # fmt: skip
        return lk.Acceptance(*out)


def _on_card(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_on_card(one) for one in arg]
    return arg.cuda() if isinstance(arg, Tensor) else arg


class Card:
    """The ops of the library on a card, by its backend "cuda"."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        schema = getattr(torch.ops.layerskip, op).default._schema

        def call(*args: Any) -> Any:
            moved = [_on_card(arg) for arg in args]
            with lk.use_backend("cuda"):
                out = getattr(lk, op)(*moved)
            for arg, there, known in zip(args, moved, schema.arguments, strict=False):
                if isinstance(arg, Tensor) and known.alias_info is not None and known.alias_info.is_write:
                    arg.copy_(there)
            return type(out)(*(one.cpu() for one in out)) if isinstance(out, tuple) else out.cpu()

        return call


Ops = Emulated | Card
