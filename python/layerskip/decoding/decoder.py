"""The decoder that a user holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..models import LayerSkipModel
from ..modules import EarlyExitHead, SharedKVCache
from . import validation
from .draft_head import DraftHead
from .output import GenerationOutput
from .steps import SingleSteps, SpeculativeRounds, prefill
from .transcript import Streamer, Transcript

CACHE_GRANULARITY = 256


class SelfSpeculativeDecoder:
    """Greedy decoding in which a model's early layers draft and its remaining layers verify (LayerSkip).

    The result is what the full model alone gives, bit for bit. One sequence at a time for now.

    Parameters
    ----------
    model : transformers.PreTrainedModel or LayerSkipModel
        Its weights are shared, not copied.
    exit_layer : int
        E: layers [0, E) draft. From 1 to L - 1.
    num_speculations : int
        K: tokens drafted a round.
    max_seq_len : int, optional
        The longest prompt and continuation; by default what the model was made for.
    draft_head : {"full", "int8"} or DraftHead
        What scores a draft: the model's head, an int8 copy of it, or int8 rows of a part of the vocabulary.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """

    def __init__(
        self,
        model: Any,
        exit_layer: int,
        num_speculations: int = 4,
        max_seq_len: int | None = None,
        draft_head: str | DraftHead = "full",
    ) -> None:
        self.model: LayerSkipModel = model if isinstance(model, LayerSkipModel) else models.adapt(model)
        self.exit_layer = validation.exit_layer(exit_layer, self.model.num_layers)
        self.num_speculations = validation.at_least_one("num_speculations", num_speculations)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.max_seq_len = validation.max_seq_len(max_seq_len, positions)
        self.tokenizer: Any = None
        self.draft_head: EarlyExitHead = _resolve_draft_head(draft_head, self.model)
        self._eos_token_id = _default_eos(model)
        self._cache: SharedKVCache | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        exit_layer: int,
        num_speculations: int = 4,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        draft_head: str | DraftHead = "full",
    ) -> SelfSpeculativeDecoder:
        """Load a model by directory or hub name; its tokenizer becomes ``decoder.tokenizer``."""
        model, tokenizer = models.load(name_or_dir, dtype=dtype)
        decoder = cls(model, exit_layer, num_speculations, max_seq_len, draft_head)
        decoder.tokenizer = tokenizer
        return decoder

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        strategy: str = "self_speculative",
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
    ) -> GenerationOutput:
        """Continue a prompt greedily.

        Parameters
        ----------
        input_ids : Tensor [1, N], int64
        max_new_tokens : int
        strategy : {"self_speculative", "autoregressive", "early_exit"}
            The first two give the same tokens. The third decodes at layer E alone, with no verification.
        exit_layer, num_speculations : int, optional
            Instead of the decoder's own.
        eos_token_id : int or sequence of int, optional
            What ends the sequence; by default what the model's generation config says. An empty list: nothing does.
        streamer : Streamer, optional
            As in transformers: ``put`` gets the prompt, then each group of accepted tokens; ``end`` closes.

        Returns
        -------
        GenerationOutput

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        FloatingPointError
            If logits are not finite; it names the layer and the position.
        """
        strategy = validation.strategy(strategy)
        exit_layer = validation.exit_layer(self.exit_layer if exit_layer is None else exit_layer, self.model.num_layers)
        num_speculations = validation.at_least_one(
            "num_speculations", self.num_speculations if num_speculations is None else num_speculations
        )
        validation.at_least_one("max_new_tokens", max_new_tokens)
        prompt = validation.prompt(input_ids, self.model.vocab_size, self.model.device)
        total = validation.length(prompt.shape[1], max_new_tokens, self.max_seq_len)
        stops = validation.stop_tokens(
            self._eos_token_id if eos_token_id is None else eos_token_id, self.model.vocab_size
        )
        transcript = Transcript(prompt, max_new_tokens, stops, streamer)
        with torch.inference_mode():
            self._decode(transcript, prompt, self._fresh_cache(total), strategy, exit_layer, num_speculations)
        return transcript.close()

    def _decode(
        self,
        transcript: Transcript,
        prompt: Tensor,
        cache: SharedKVCache,
        strategy: str,
        exit_layer: int,
        num_speculations: int,
    ) -> None:
        depth = exit_layer if strategy == "early_exit" else self.model.num_layers
        steps: SingleSteps | SpeculativeRounds = SingleSteps(self.model, cache, depth)
        if strategy == "self_speculative":
            steps = SpeculativeRounds(self.model, cache, exit_layer, num_speculations, self.draft_head)
        token, first = prefill(self.model, cache, prompt, depth)
        transcript.add_first(first)
        position = prompt.shape[1]
        while not transcript.finished:
            progress = steps.step(token, transcript.remaining, position)
            transcript.add_round(progress.drafts, progress.token, progress.drafted, progress.fault)
            token = progress.next_token
            position += len(progress.drafts) + 1

    @torch.inference_mode(False)
    def _fresh_cache(self, length: int) -> SharedKVCache:
        """An empty cache with room for ``length`` positions: the last call's where that is big enough.

        Whatever a failed call left in it lies beyond the length 0, so it is not read.
        """
        like = (self.model.dtype, self.model.device)
        if self._cache is None or self._cache.capacity < length or (self._cache.k.dtype, self._cache.k.device) != like:
            capacity = min(-(-length // CACHE_GRANULARITY) * CACHE_GRANULARITY, self.max_seq_len)
            self._cache = self.model.decoder.new_cache(1, capacity)
        self._cache.reset()
        return self._cache


def _resolve_draft_head(draft_head: str | DraftHead, model: LayerSkipModel) -> EarlyExitHead:
    if isinstance(draft_head, DraftHead):
        return draft_head.of(model)
    if draft_head == "int8":
        return model.head.quantize()
    if draft_head == "full":
        return model.head
    raise ValueError(f"draft_head must be 'full', 'int8' or a DraftHead, got {draft_head!r}")


def _default_eos(model: Any) -> int | Sequence[int] | None:
    """The generation config knows best; a model without one has a config."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return eos
    return None
