"""How many bytes decoding has to read: every weight once a pass, and the keys and values of the context."""

from __future__ import annotations

from ..decoding import Stats
from ..models import EarlyExitHead, LayerSkipModel


def head_bytes(head: EarlyExitHead) -> int:
    """The head's rows and their scales; of a token map only single entries are read."""
    scale = 0 if head.scale is None else head.scale.nbytes
    return head.norm_weight.nbytes + head.head_weight.nbytes + scale


def layer_bytes(model: LayerSkipModel, start: int, end: int) -> int:
    """The weights of layers [start, end)."""
    return sum(weight.nbytes for weight in model.decoder.layer_weights(start, end))


def bytes_per_token(model: LayerSkipModel, stats: Stats, exit_layer: int | None = None) -> float:
    """Bytes that the new tokens after the first cost to read, over their number.

    Without ``exit_layer``: each token reads the whole model. With it: a round of K drafts reads layers [0, E) and the
    blocks K + 1 times, the draft head K times, and the other layers and the head once. The context is taken at its mean
    length.
    """
    decoder = model.decoder
    context = stats.prompt_tokens + stats.new_tokens / 2
    kv_layer = 2 * decoder.num_kv_heads * decoder.head_dim * model.dtype.itemsize * context
    num_layers, below = model.num_layers, exit_layer or 0
    upper = layer_bytes(model, below, num_layers) + kv_layer * (num_layers - below) + head_bytes(model.head)
    total = stats.rounds * upper
    if exit_layer is not None:
        blocks = layer_bytes(model, num_layers, num_layers + decoder.num_blocks)
        lower = layer_bytes(model, 0, below) + blocks + kv_layer * (below + decoder.num_blocks)
        total += (stats.drafted + stats.rounds) * lower + stats.drafted * head_bytes(model.draft_head)
    return total / max(1, stats.new_tokens - 1)
