"""The weights of a model by the names that transformers gives them."""

from __future__ import annotations

from torch import Tensor

from layerskip_kernels.formats import is_interleaved, rows_of

from .assembly import EMBEDDING, HEAD, LAYERS, NORM
from .families import ARCHITECTURES
from .model import LayerSkipModel
from .quantized import with_widths


def named_weights(model: LayerSkipModel) -> dict[str, Tensor]:
    """Of a model's embedding, layers and head, packed or plain; a tied head is the embedding, and has no entry.

    What lies interleaved is given as rows, as any other reader expects it.
    """
    named: dict[str, Tensor] = {EMBEDDING: model.embedding, NORM: model.head.kept_norm}
    if not model.config.tie_word_embeddings:
        named[HEAD] = model.head.head_weight
    paths = ARCHITECTURES[model.config.model_type].layer_paths
    for number in range(model.num_layers):
        layer = model.decoder.held(number)
        named |= {f"{LAYERS}.{number}.{path}": layer[name] for name, path in paths.items()}
    widths = {id(weight): width for weight, width in with_widths(model) if is_interleaved(weight)}
    return {name: rows_of(one, widths[id(one)]) if id(one) in widths else one for name, one in named.items()}
