"""What an adapter makes of a Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import EarlyExitHead, PartialDepthDecoder
from ..modules._weights import shared


class LayerSkipModel(nn.Module):
    """Embedding, layers and head of a causal language model, on the storage of the model that they came from.

    Parameters
    ----------
    embedding : Tensor [V, D]
    decoder : PartialDepthDecoder
    head : EarlyExitHead
    config : object
        Configuration of the model that it was made from.
    generation_config : object, optional
        The same of its generation: what ends a sequence.
    """

    def __init__(
        self,
        embedding: Tensor,
        decoder: PartialDepthDecoder,
        head: EarlyExitHead,
        config: Any,
        generation_config: Any = None,
    ) -> None:
        super().__init__()
        self.embedding = shared(embedding)
        self.decoder = decoder
        self.head = head
        self.config = config
        self.generation_config = generation_config

    @property
    def num_layers(self) -> int:
        """L."""
        return self.decoder.num_layers

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and states."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.device

    def embed(self, token_ids: Tensor) -> Tensor:
        """The state before layer 0.

        Parameters
        ----------
        token_ids : Tensor [B, M], int64
            Within the vocabulary.

        Returns
        -------
        Tensor [B, M, D]
        """
        with torch.no_grad():
            return F.embedding(token_ids, self.embedding)
