"""Reading prompts into the cache, in passes that may be as short as a step has time for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import explain

from ..models import LayerSkipModel, SharedKVCache
from .sending import sent

FUSED_ROWS = 256
"""The most rows of a pass through the fused layers. SmolLM2 in bf16 on two cores of a Zen 5 reads 4096 tokens in 2.49 s
with 64 rows, 2.31 with 128, 2.27 with 192 and 2.21 with 256."""
TORCH_ROWS = 256
"""The rows of a pass of torch's matmuls. With 512 rows it is as fast, with 128 a tenth slower."""


@dataclass(eq=False)
class Reading:
    """A prompt, and how much of it the cache holds.

    Attributes
    ----------
    prompt : Tensor [1, N], int64
    depth : int
        It is read with layers [0, depth), of which those from L on are the exit's blocks.
    slot : int
        The row of the cache.
    done : int
        The first ``done`` tokens are in the cache.
    state : Tensor [1, D] or None
        That of the prompt's last token after these layers, once it is read.
    """

    prompt: Tensor
    depth: int
    slot: int = -1
    done: int = 0
    state: Tensor | None = None

    @property
    def left(self) -> int:
        """How many tokens are still to be read."""
        return self.prompt.shape[1] - self.done


class PromptReader:
    """Runs prompts through the layers, pass by pass, into the rows of a cache. The passes do not change the result.

    Where the native CPU library serves them, the fused layers read prompts. They give a row the same bits whatever is
    computed with it. So a pass may have any number of tokens and hold several prompts, what was decoded counts as
    read, and any prefix that the cache holds may be taken over. They are not slower than torch's matmuls, either.

    Elsewhere torch's matmuls do it, on a card because they are made for many rows. Their rounding depends on the number
    of rows. So each prompt is read alone and is always cut at the multiples of `TORCH_ROWS`, and only whole parts
    between two cuts that were read as a prompt may be taken over.

    Parameters
    ----------
    model : LayerSkipModel
    cache : SharedKVCache
    """

    def __init__(self, model: LayerSkipModel, cache: SharedKVCache) -> None:
        self._model, self._cache = model, cache

    @property
    def fused(self) -> bool:
        """Whether the fused layers read prompts."""
        return explain("partial_forward", self._model.embedding).backend == "cpu"

    def _depth(self, reading: Reading) -> dict[str, Any]:
        """Which layers read a prompt, as `LayerSkipModel.read` takes it."""
        layers = self._model.num_layers
        return {"end": min(reading.depth, layers), "blocks": self.reads_blocks(reading)}

    def reusable(self, length: int) -> int:
        """How many of ``length`` tokens that were read as part of one prompt can stand for those of another."""
        return length if self.fused else length // TORCH_ROWS * TORCH_ROWS

    def reads_blocks(self, reading: Reading) -> bool:
        """Whether an exit's blocks read a prompt, too."""
        return reading.depth > self._model.num_layers

    def read_blocks(self, slot: int, tokens: Sequence[int], done: int, end: int) -> None:
        """See `read_blocks`."""
        read_blocks(self._model, self._cache, slot, tokens, done, end)

    def read(self, readings: Sequence[Reading], most: int = sys.maxsize) -> int:
        """Run one pass over the next tokens of some prompts; return how many tokens it read.

        Parameters
        ----------
        readings : sequence of Reading
            Of one depth, each with tokens left, and only one where torch's matmuls read.
        most : int
            The most tokens to read; torch's matmuls read up to the next cut in any case.
        """
        with torch.inference_mode():
            return self._read_fused(readings, most) if self.fused else self._read_with_torch(readings[0])

    def _read_fused(self, readings: Sequence[Reading], most: int) -> int:
        model, most = self._model, min(most, FUSED_ROWS)
        readings = readings[:most]
        rows = min(max(1, most // len(readings)), *(reading.left for reading in readings))
        tokens = torch.cat([reading.prompt[:, reading.done : reading.done + rows] for reading in readings])
        places = [[reading.done for reading in readings], [reading.slot for reading in readings]]
        seq_lens, slots = sent(torch.tensor(places), model.device).unbind()
        hidden = model.read(tokens, self._cache, **self._depth(readings[0]), seq_lens=seq_lens, slots=slots)
        for index, reading in enumerate(readings):
            _advance(reading, rows, hidden[index : index + 1])
        return tokens.numel()

    def _read_with_torch(self, reading: Reading) -> int:
        model, row = self._model, self._cache.slot(reading.slot)
        end = (reading.done // TORCH_ROWS + 1) * TORCH_ROWS
        tokens = reading.prompt[:, reading.done : end]
        row.seq_lens.fill_(reading.done)
        hidden = model.prefill(tokens, row, **self._depth(reading))
        _advance(reading, tokens.shape[1], hidden)
        return tokens.numel()


def _advance(reading: Reading, rows: int, hidden: Tensor) -> None:
    """Note that so many tokens were read, which gave the states [1, rows, D]."""
    reading.state = hidden[:, -1]
    reading.done += rows


@torch.inference_mode()
def read_blocks(
    model: LayerSkipModel, cache: SharedKVCache, slot: int, tokens: Sequence[int], done: int, end: int
) -> None:
    """Let an exit's blocks read ``tokens[done:end]``, which the model's own layers have read before.

    While others draft, blocks read nothing: rounds that look drafts up cost nothing for an exit that is not used.
    Layers [0, E) run again, to the same bits.
    """
    exit_layer, device = model.exit_layer, model.device
    for begin in range(done, end, FUSED_ROWS):
        some = sent(torch.tensor([tokens[begin : min(begin + FUSED_ROWS, end)]]), device)
        seq_lens, slots = sent(torch.tensor([[begin], [slot]]), device).unbind()
        model.read(some, cache, exit_layer, blocks=True, seq_lens=seq_lens, slots=slots)


def read_prompt(model: LayerSkipModel, cache: SharedKVCache, slot: int, prompt: Tensor, depth: int) -> Tensor:
    """Run a whole ``prompt`` [1, N] through layers [0, depth) into one row of the cache; its last state [1, D]."""
    reader, reading = PromptReader(model, cache), Reading(prompt, depth, slot)
    while reading.left:
        reader.read([reading])
    assert reading.state is not None
    return reading.state
