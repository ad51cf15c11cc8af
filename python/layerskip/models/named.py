"""The weights of a model by the names that transformers gives them."""

from __future__ import annotations

from torch import Tensor

from .assembly import EMBEDDING, HEAD, LAYERS, NORM
from .families import ARCHITECTURES
from .model import LayerSkipModel


def named_weights(model: LayerSkipModel) -> dict[str, Tensor]:
    """Of a model's embedding, layers and head, packed or plain; a tied head is the embedding, and has no entry."""
    named: dict[str, Tensor] = {EMBEDDING: model.embedding, NORM: model.head.kept_norm}
    if not model.config.tie_word_embeddings:
        named[HEAD] = model.head.head_weight
    paths = ARCHITECTURES[model.config.model_type].layer_paths
    for number in range(model.num_layers):
        layer = model.decoder.held(number)
        named |= {f"{LAYERS}.{number}.{path}": layer[name] for name, path in paths.items()}
    return named
