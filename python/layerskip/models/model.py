"""An early-exit model: embedding, layers and head of a causal language model, and the two calls that decode with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerskip_kernels import Draft, Noise, Round, draft, linear, speculative_round
from layerskip_kernels.formats import lookup

from .._autograd_modes import keeps_grad_mode
from .generic_layers import Product, torch_linear
from .head import EarlyExitHead, ExitWeights, shared
from .kv_cache import SharedKVCache
from .layers import PartialDepthDecoder
from .quantize import format_names, quantize_model, with_widths


class LayerSkipModel(nn.Module):
    """Embedding, layers and head of a causal language model, on the storage of the model that they came from.

    Embedding, head and the weights of the layers' matmuls may be packed (`layerskip_kernels.formats`).

    Parameters
    ----------
    embedding : Tensor [V, D]
    decoder : PartialDepthDecoder
    head : EarlyExitHead
    config, generation_config : object
        Configurations of the model that it was made from.
    exit : ExitWeights, optional
        By default drafts use ``head`` after any early layer, and ``exit_layer`` is None.
    """

    def __init__(
        self,
        embedding: Tensor,
        decoder: PartialDepthDecoder,
        head: EarlyExitHead,
        config: Any,
        generation_config: Any = None,
        exit: ExitWeights | None = None,
    ) -> None:
        super().__init__()
        exit = ExitWeights(None, head) if exit is None else exit
        for one in (head, exit.head):
            if one.eps != decoder.eps:
                raise ValueError(f"the head's eps is {one.eps}, the decoder's {decoder.eps}; an op takes one for both")
        self.embedding = shared(embedding)
        self.decoder = decoder.with_draft_layers(exit.draft_layers) if exit.draft_layers else decoder
        self.head, self.exit_layer = head, exit.exit_layer
        self._own_draft_head = None if exit.head is head else exit.head  # else it were in the state dict twice
        self.config = config
        self.generation_config = generation_config

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers

    @property
    def draft_head(self) -> EarlyExitHead:
        """The head of drafts, which may be approximate, since ``head`` verifies them."""
        return self.head if self._own_draft_head is None else self._own_draft_head

    def with_exit(self, exit: ExitWeights) -> LayerSkipModel:
        """A model with the same weights, on the same storage, that drafts with an exit."""
        if self.decoder.num_draft_layers:
            raise ValueError("the model has an exit with draft layers already; give the exit to the model without it")
        return LayerSkipModel(self.embedding, self.decoder, self.head, self.config, self.generation_config, exit)

    @property
    def weights(self) -> str:
        """The dtype or formats of the matrices: "bfloat16", "int4+int8"."""
        return "+".join(format_names(self.matrices()))

    def matrices(self) -> list[tuple[Tensor, int]]:
        """Each matrix of the layers, the head and the embedding, with the width of its inputs."""
        return with_widths(self.embedding, self.decoder, self.head)

    def quantize(
        self,
        weights: str,
        *,
        release: bool = False,
        progress: Callable[[int, int], None] | None = None,
        calibration: Sequence[Tensor] = (),
    ) -> LayerSkipModel:
        """Pack layers, embedding and head in a format; norms and biases are shared.

        Parameters
        ----------
        weights : str
            One of `layerskip_kernels.formats.FORMATS`: "int8", "int4", … With four bits, embedding and head are int8.
        release : bool
            Free each weight as soon as it is packed. This model, and the one that it came from, are of no use
            afterwards.
        progress : callable, optional
            Called after each weight with the number of weights packed, and of all.
        calibration : sequence of Tensor [N], int64
            Token ids of texts, some hundreds of tokens in all, by which weights are rounded with less loss
            (`layerskip.models.quantize`). By default to nearest.

        Returns
        -------
        LayerSkipModel

        Raises
        ------
        ValueError
            If the format is unknown or does not suit a width, the model is packed or has an exit already, or a weight
            is not finite.
        """
        if self._own_draft_head is not None or self.decoder.num_draft_layers:
            raise ValueError("the model has an exit; quantize the model without it, then give it the exit")
        parts = self.embedding, self.decoder, self.head
        made = quantize_model(*parts, weights, release, progress, calibration)
        return LayerSkipModel(*made, self.config, self.generation_config)

    @property
    def vocab_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def max_positions(self) -> int | None:
        """The longest text that is computed as the model does; None for any length."""
        bounds = getattr(self.config, "max_position_embeddings", None), self.decoder.max_positions
        return min((bound for bound in bounds if bound is not None), default=None)

    @keeps_grad_mode
    def refresh(self) -> None:
        """Update views of weights whose memory, and norms whose values, may have changed."""
        self.decoder.refresh()
        self.head.refresh()

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def embed(self, token_ids: Tensor) -> Tensor:
        """The state [B, M, D] before layer 0 of token ids [B, M]."""
        with torch.no_grad():
            return lookup(self.embedding, token_ids, self.decoder.hidden_size, self.dtype)

    def read(
        self,
        token_ids: Tensor,
        cache: SharedKVCache,
        num_layers: int | None = None,
        *,
        draft_layers: bool = False,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Run known tokens, of a prompt or of lookup drafts, through layers [0, num_layers), fused.

        Parameters
        ----------
        token_ids : Tensor [B, M], int64
            Row m of sequence b is at position ``seq_lens[b] + m``. Lengths are not advanced.
        cache, seq_lens, slots
            As in `PartialDepthDecoder.forward`.
        num_layers : int, optional
            By default all.
        draft_layers : bool
            Whether the exit is to draft later: its draft layers, if any, must have run on all tokens before.

        Returns
        -------
        Tensor [B, M, D]
            The states after these layers, bit for bit those that the tokens would have one by one.
        """
        return self._read(token_ids, cache, num_layers, draft_layers, self.decoder.forward, linear, seq_lens, slots)

    def prefill(
        self, token_ids: Tensor, cache: SharedKVCache, num_layers: int | None = None, *, draft_layers: bool = False
    ) -> Tensor:
        """`read` with torch's matmuls, at the lengths of the cache, see `PartialDepthDecoder.prefill`."""
        return self._read(token_ids, cache, num_layers, draft_layers, self.decoder.prefill, torch_linear)

    def _read(
        self,
        token_ids: Tensor,
        cache: SharedKVCache,
        num_layers: int | None,
        draft_layers: bool,
        run: Callable[..., Tensor],
        product: Product,
        *places: Tensor | None,
    ) -> Tensor:
        """Nothing reads the states after the last draft layer, so only its keys and values are computed."""
        decoder, exit_layer, hidden = self.decoder, self.exit_layer, self.embed(token_ids)
        num_layers = self.num_layers if num_layers is None else num_layers
        if not (draft_layers and decoder.num_draft_layers):
            return run(hidden, cache, 0, num_layers, *places)
        assert exit_layer is not None  # a model with draft layers has one
        hidden = run(hidden, cache, 0, exit_layer, *places)
        last = self.num_layers + decoder.num_draft_layers - 1
        state = run(hidden, cache, self.num_layers, last, *places) if last > self.num_layers else hidden
        decoder.write_keys(state, cache, last, product, *places)
        return run(hidden, cache, exit_layer, num_layers, *places) if num_layers > exit_layer else hidden

    def decode(
        self,
        token: Tensor,
        cache: SharedKVCache,
        num_layers: int,
        *,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """The next token by layers [0, num_layers) and the model's own head, as one fused call.

        Lengths are not advanced. With fewer than all layers it is an early exit that nothing verifies.

        Parameters
        ----------
        token : Tensor [B], int64
            The last tokens, at positions ``seq_lens``; the returned tokens have the same shape.
        cache, seq_lens, slots
            As in `PartialDepthDecoder.forward`, and so are the errors.
        num_layers : int
        noise : layerskip_kernels.Noise, optional
            Draws the tokens, as `layerskip_kernels.draft` does; by default they are the arg-max.
        """
        self._check_num_layers(num_layers)
        decoder = self.decoder
        kv_cache, weights = decoder.kv_cache(cache, seq_lens, slots), decoder.layer_weights(0, num_layers)
        with torch.no_grad():
            return draft(
                token, self.embedding, weights, kv_cache, num_layers, self.head.weights, 1, extend=False,
                eps=decoder.eps, noise=noise, ops=decoder.ops,
            ).tokens[:, 0]  # fmt: skip

    def draft(
        self,
        token: Tensor,
        cache: SharedKVCache,
        exit_layer: int,
        num_speculations: int,
        *,
        draft_threshold: float = 0.0,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
        noise: Noise | None = None,
        logits: Tensor | None = None,
    ) -> Draft:
        """Draft K tokens with layers [0, E), the exit's draft layers and its head, as one fused call.

        The last draft token, too, runs through the layers: verification and the next draft need its keys and values.
        Lengths are not advanced. Parameters and errors as in `decode` and `layerskip_kernels.draft`.
        """
        self._check_exit(exit_layer)
        decoder = self.decoder
        weights = [*decoder.layer_weights(0, exit_layer), *decoder.draft_layer_weights]
        with torch.no_grad():
            return draft(
                token, self.embedding, weights, decoder.kv_cache(cache, seq_lens, slots), exit_layer,
                self.draft_head.weights, num_speculations, extend=True, eps=decoder.eps, noise=noise, logits=logits,
                draft_threshold=draft_threshold, num_draft_layers=decoder.num_draft_layers, ops=decoder.ops,
            )  # fmt: skip

    def speculate(
        self,
        token: Tensor,
        cache: SharedKVCache,
        exit_layer: int,
        num_speculations: int,
        *,
        draft_threshold: float = 0.0,
        seq_lens: Tensor | None = None,
        slots: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Round:
        """One round of self-speculative decoding as one fused call; accepting advances ``seq_lens`` in place.

        Parameters and errors as in `decode` and `layerskip_kernels.speculative_round`. The cache needs room for K + 1
        more positions of every sequence.
        """
        self._check_exit(exit_layer)
        decoder = self.decoder
        weights = decoder.layer_weights(0, decoder.num_layers + decoder.num_draft_layers)
        draft_head = None if self.draft_head is self.head else self.draft_head.weights
        with torch.no_grad():
            return speculative_round(
                token, self.embedding, weights, decoder.kv_cache(cache, seq_lens, slots), exit_layer,
                self.head.weights, num_speculations, draft_head=draft_head, draft_threshold=draft_threshold,
                eps=decoder.eps, noise=noise, num_draft_layers=decoder.num_draft_layers, ops=decoder.ops,
            )  # fmt: skip

    def _check_exit(self, exit_layer: int) -> None:
        self._check_num_layers(exit_layer)
        if self.exit_layer not in (None, exit_layer):
            raise ValueError(f"exit_layer is {exit_layer}, but the model's exit is after {self.exit_layer} layers")

    def _check_num_layers(self, num_layers: int) -> None:
        if not 1 <= num_layers <= self.num_layers:
            raise ValueError(f"layers [0, {num_layers}) are not within the decoder's {self.num_layers}")
