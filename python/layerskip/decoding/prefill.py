"""Reading a prompt into the cache."""

from __future__ import annotations

from torch import Tensor

from ..models import LayerSkipModel, SharedKVCache

PREFILL_CHUNK = 512


def prefill(model: LayerSkipModel, cache: SharedKVCache, slot: int, prompt: Tensor, depth: int) -> Tensor:
    """Run ``prompt`` [1, N] through layers [0, depth) into one slot; its last state, [1, D].

    A prompt is read alone, so that what it gives does not depend on other prompts.
    """
    own = cache.slot(slot)
    own.reset()
    for chunk in prompt.split(PREFILL_CHUNK, dim=1):
        hidden = model.decoder.prefill(model.embed(chunk), own, 0, depth)
        own.seq_lens.add_(chunk.shape[1])
    return hidden[:, -1]
