"""An early-exit model: embedding, layers and head of a causal language model, and the two calls that decode with it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerskip_kernels import Draft, Noise, Round, draft, speculative_round

from .cache import SharedKVCache
from .head import EarlyExitHead
from .layers import PartialDepthDecoder
from .weights import shared


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
        Generation configuration of that model: among others, which tokens end a sequence.
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

    def draft(
        self,
        token: Tensor,
        cache: SharedKVCache,
        exit_layer: int,
        num_speculations: int,
        *,
        head: EarlyExitHead | None = None,
        extend: bool = True,
        draft_threshold: float = 0.0,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
        noise: Noise | None = None,
        logits: Tensor | None = None,
    ) -> Draft:
        """Decode some tokens with layers [0, exit_layer) and a head, as one fused call. Lengths are not advanced.

        Parameters
        ----------
        token : Tensor [B], int64
            The last tokens, at positions ``seq_lens``.
        cache : SharedKVCache
        exit_layer : int
            E; all layers, to decode with the whole model.
        num_speculations : int
            K, the number of tokens to decode.
        head : EarlyExitHead, optional
            What chooses the tokens; by default the model's own head.
        extend : bool
            Whether the last token, too, goes through the layers, as verification needs it.
        draft_threshold : float
            As in `layerskip_kernels.draft`.
        seq_lens, slots : Tensor [B], int64, optional
            As in `PartialDepthDecoder.forward`.
        noise : layerskip_kernels.Noise, optional
            Draws the tokens, as `layerskip_kernels.draft` does; by default they are the arg-max.
        logits : Tensor [B, K, V_draft], fp32, optional
            The raw logits are written to it.

        Returns
        -------
        Draft
            Tokens [B, K], states [B, K + extend, D], and the tokens' probabilities [B, K].

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype, device or layer is wrong, or the rows do not fit into the cache.
        """
        head = self.head if head is None else head
        self._check_exit(exit_layer, head)
        with torch.no_grad():
            return draft(
                token,
                self.embedding,
                self.decoder.layer_weights(0, exit_layer),
                self.decoder.kv_cache(cache, seq_lens, slots),
                exit_layer,
                head.weights,
                num_speculations,
                extend=extend,
                eps=head.eps,
                draft_threshold=draft_threshold,
                noise=noise,
                logits=logits,
            )

    def verify(
        self,
        tokens: Tensor,
        cache: SharedKVCache,
        *,
        end: int | None = None,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Run the last tokens and drafts that were looked up through the layers, from layer 0. Lengths stay.

        Parameters
        ----------
        tokens : Tensor [B, K + 1], int64
            Row 0 holds the last tokens, at positions ``seq_lens``.
        cache : SharedKVCache
        end : int, optional
            Only layers [0, end): for sequences that are verified together with others, whose drafts an exit makes.
        seq_lens, slots : Tensor [B], int64, optional
            As in `PartialDepthDecoder.forward`.

        Returns
        -------
        Tensor [B, K + 1, D]
            The states after these layers, bit for bit those that the tokens would have one by one.
        """
        return self.decoder.forward(self.embed(tokens), cache, 0, end, seq_lens, slots)

    def speculate(
        self,
        token: Tensor,
        cache: SharedKVCache,
        exit_layer: int,
        num_speculations: int,
        *,
        draft_head: EarlyExitHead | None = None,
        draft_threshold: float = 0.0,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Round:
        """One round as one fused call: layers [0, E) draft, layers [E, L) verify, accepting advances the lengths.

        Parameters
        ----------
        token : Tensor [B], int64
            The last tokens, at positions ``seq_lens``.
        cache : SharedKVCache
            With room for K + 1 more positions of every sequence.
        exit_layer : int
            E.
        num_speculations : int
            K.
        draft_head : EarlyExitHead, optional
            What chooses the drafts. It may be approximate, since the model's own head verifies them; by default it is
            that head.
        draft_threshold : float
            As in `layerskip_kernels.speculative_round`, which takes it without noise only.
        seq_lens : Tensor [B], int64, optional
            Advanced in place; by default the cache's.
        slots, noise
            As in `draft`.

        Returns
        -------
        Round
            Tokens [B, K], how many are accepted [B], the token that follows them [B], probabilities [B, K].

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype, device or layer is wrong, or the rows do not fit into the cache.
        """
        draft_head = self.head if draft_head is None else draft_head
        self._check_exit(exit_layer, draft_head)
        full = self.head.weights
        if draft_head.norm_weight.data_ptr() != full.norm_weight.data_ptr():
            raise ValueError("the draft head has a norm of its own, a round has one; use model.head.quantize()")
        drafting = None if draft_head is self.head else draft_head.weights._replace(norm_weight=full.norm_weight)
        with torch.no_grad():
            return speculative_round(
                token,
                self.embedding,
                self.decoder.layer_weights(0, self.num_layers),
                self.decoder.kv_cache(cache, seq_lens, slots),
                exit_layer,
                full,
                num_speculations,
                draft_head=drafting,
                draft_threshold=draft_threshold,
                eps=self.head.eps,
                noise=noise,
            )

    def _check_exit(self, exit_layer: int, head: EarlyExitHead) -> None:
        """One eps serves all norms of a call."""
        if head.eps != self.decoder.eps:
            raise ValueError(
                f"the head's eps is {head.eps}, the decoder's {self.decoder.eps}; a draft takes one for both"
            )
        if not 1 <= exit_layer <= self.num_layers:
            raise ValueError(f"layers [0, {exit_layer}) are not within the decoder's {self.num_layers}")
