"""The decoder that a user holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from . import graph, validation
from .adaptive import Controller, default_exits
from .costs import Sizes
from .draft_head import DraftHead
from .graph import Graphs
from .output import GenerationOutput, Streamer
from .processors import LogitsProcessor
from .sampling import SamplingParams, params_of_each
from .session import Session
from .streaming import stream
from .text import stop_rules
from .transcript import StopRule

CACHE_GRANULARITY = 256


class SelfSpeculativeDecoder:
    """Decoding in which a model's early layers draft and its remaining layers verify (LayerSkip).

    Greedy results are what the full model alone gives, bit for bit; sampled ones have its exact distribution.

    Parameters
    ----------
    model : transformers.PreTrainedModel or LayerSkipModel
        Its weights are shared, not copied.
    exit_layer : int or "auto"
        E: layers [0, E) draft. From 1 to L - 1; "auto" picks by measured speed, see `Controller`.
    num_speculations : int or "auto"
        K: tokens drafted a round.
    max_seq_len : int, optional
        The longest prompt and continuation; by default what the model was made for.
    draft_head : {"full", "int8"} or DraftHead
        What scores a draft: the model's head, an int8 copy of it, or int8 rows of a part of the vocabulary.
    exit_choices : sequence of int, optional
        What "auto" picks the exit layer from; by default an eighth, a quarter, a half and three quarters of the layers.

    Attributes
    ----------
    controller : Controller
        What "auto" has learned; it goes on learning with every call and session.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """

    def __init__(
        self,
        model: Any,
        exit_layer: int | str,
        num_speculations: int | str = 4,
        max_seq_len: int | None = None,
        draft_head: str | DraftHead = "full",
        exit_choices: Sequence[int] | None = None,
    ) -> None:
        self.model: LayerSkipModel = model if isinstance(model, LayerSkipModel) else models.adapt(model)
        layers = self.model.num_layers
        validation.exit_layer_or_auto(exit_layer, layers)
        self.exit_layer, self.num_speculations = exit_layer, num_speculations
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.max_seq_len = validation.max_seq_len(max_seq_len, positions)
        validation.count_or_auto("num_speculations", num_speculations, validation.MOST_DRAFTS)
        self.tokenizer: Any = None
        self.draft_head: EarlyExitHead = _resolve_draft_head(draft_head, self.model)
        self.eos_token_id: int | Sequence[int] | None = _of_config(model, "eos_token_id")
        self._pad_token_id = _of_config(model, "pad_token_id")
        exits = default_exits(layers) if exit_choices is None else exit_choices
        exits = [validation.exit_layer(choice, layers) for choice in exits]
        if not exits:
            raise ValueError(f"exit_choices must hold at least one layer, got {exit_choices!r}")
        self.controller = Controller(Sizes.of(self.model, self.draft_head), exits)
        self._cache: SharedKVCache | None = None
        self._graphs: Graphs | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        exit_layer: int | str,
        num_speculations: int | str = 4,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        draft_head: str | DraftHead = "full",
        exit_choices: Sequence[int] | None = None,
    ) -> SelfSpeculativeDecoder:
        """Load a model by directory or hub name; its tokenizer becomes ``decoder.tokenizer``."""
        model, tokenizer = models.load(name_or_dir, dtype=dtype)
        decoder = cls(model, exit_layer, num_speculations, max_seq_len, draft_head, exit_choices)
        decoder.tokenizer = tokenizer
        return decoder

    def open_session(
        self,
        max_batch: int,
        *,
        max_seq_len: int | None = None,
        num_speculations: int | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Session:
        """A session with a cache of its own, for requests that come and go.

        Parameters
        ----------
        max_batch : int
            How many requests run at once; more than these wait.
        max_seq_len : int, optional
            The longest prompt and continuation of a request; by default the decoder's, which may take much memory.
        num_speculations : int or "auto", optional
            The most drafts that a request may ask for; by default the decoder's.
        generator : torch.Generator, optional
            Draws the seeds of requests that bring none; by default torch's own.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        """
        validation.at_least_one("max_batch", max_batch)
        length = self.max_seq_len
        if max_seq_len is not None:
            length = validation.integer_in("max_seq_len", max_seq_len, 1, self.max_seq_len)
        drafts = self._most_speculations(num_speculations)
        with torch.inference_mode(False):
            cache = self.model.decoder.new_cache(max_batch, length + drafts + 1)
        return Session(self, cache, length, drafts, generator, graphs=graph.for_device(self.model.device))

    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor | Sequence[int]],
        max_new_tokens: int = 128,
        strategy: str = "self_speculative",
        exit_layer: int | str | None = None,
        num_speculations: int | str | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
        *,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        generator: torch.Generator | None = None,
        draft_threshold: float = 0.0,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor | None] | None = None,
        should_stop: StopRule | Sequence[StopRule | None] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        pad_token_id: int | None = None,
    ) -> GenerationOutput:
        """Continue prompts; each as if it were alone.

        Parameters
        ----------
        input_ids : Tensor [B, N], int64, or sequence of prompts
            The rows of a tensor are taken whole; prompts of different lengths are given as a list of tensors [N] or
            lists of int.
        max_new_tokens : int
            For each prompt.
        strategy, exit_layer, num_speculations, draft_threshold
            As in `Session.add`.
        eos_token_id : int or sequence of int, optional
            What ends a sequence; by default what the model's generation config says. An empty list: nothing does.
        streamer : Streamer, optional
            As in transformers: ``put`` gets the prompt, then each group of accepted tokens; ``end`` closes. For one
            prompt.
        sampling : SamplingParams, or one for each prompt
            By default greedy. With one for all and a seed in it, prompt b has the seed ``seed + b``.
        generator : torch.Generator, optional
            Draws the seeds of prompts that have none; by default torch's own.
        logits_processor, should_stop : callable, or one (or None) for each prompt
            As in `Session.add`.
        stop_strings : str or sequence of str, optional
            A sequence ends with the token that completes one in its new text; needs ``decoder.tokenizer``.
        pad_token_id : int, optional
            What pads the rows of the result; by default the model's padding token, else its first EOS token, else 0.

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
        prompts = validation.prompts(input_ids)
        count = len(prompts)
        if streamer is not None and count > 1:
            raise ValueError(f"a streamer takes one prompt, got a batch of {count}")
        pad = self._pad(pad_token_id, eos_token_id)
        drafts = self._most_speculations(num_speculations)
        lengths = [len(row) if isinstance(row, (list, tuple)) else row.numel() for row in prompts]
        validation.at_least_one("max_new_tokens", max_new_tokens)
        total = validation.length(max(lengths), max_new_tokens, self.max_seq_len)
        cache = self._shared_cache(count, total + drafts + 1)
        session = Session(self, cache, total, drafts, generator, graphs=self._shared_graphs())
        rules = validation.one_each("should_stop", should_stop, count)
        hooks = zip(
            params_of_each(sampling, count),
            validation.one_each("logits_processor", logits_processor, count),
            rules if stop_strings is None else stop_rules(self.tokenizer, stop_strings, prompts, rules),
            strict=True,
        )
        for row, (params, processor, rule) in zip(prompts, hooks, strict=True):
            session.add(
                row,
                max_new_tokens,
                strategy=strategy,
                exit_layer=exit_layer,
                num_speculations=num_speculations,
                draft_threshold=draft_threshold,
                sampling=params,
                eos_token_id=eos_token_id,
                logits_processor=processor,
                should_stop=rule,
            )
        if streamer is not None:
            streamer.put(torch.as_tensor(prompts[0]).cpu().view(1, -1))
        return GenerationOutput.of_rows(_run(session, count, streamer), pad)

    def stream(self, prompt: str | Tensor | Sequence[int], max_new_tokens: int = 128, **options: Any) -> Iterator[str]:
        """Continue a prompt, and yield the text as it becomes certain; see `layerskip.decoding.streaming.stream`."""
        return stream(self, prompt, max_new_tokens, **options)

    def _most_speculations(self, num_speculations: int | str | None) -> int:
        """The most drafts of a round, which the cache needs room for."""
        value = self.num_speculations if num_speculations is None else num_speculations
        count = validation.count_or_auto("num_speculations", value, validation.MOST_DRAFTS)
        return self.controller.max_speculations if count is None else count

    def _pad(self, pad_token_id: int | None, eos_token_id: int | Sequence[int] | None) -> int:
        if pad_token_id is not None:
            return validation.integer_in("pad_token_id", pad_token_id, 0, self.model.vocab_size - 1)
        if self._pad_token_id is not None:
            return self._pad_token_id
        stops = self.eos_token_id if eos_token_id is None else eos_token_id
        return min(validation.stop_tokens(stops, self.model.vocab_size), default=0)

    def _shared_graphs(self) -> Graphs | None:
        """The rounds recorded over the shared cache, where the model is on a card."""
        graphs = graph.for_device(self.model.device)
        if graphs is not None and self._graphs is None:
            self._graphs = graphs
        return None if graphs is None else self._graphs

    @torch.inference_mode(False)
    def _shared_cache(self, batch: int, length: int) -> SharedKVCache:
        """A cache with room for so many sequences and positions: the last call's where that is big enough.

        Whatever it holds lies beyond the lengths that sequences start from, so it is not read.
        """
        like, old = (self.model.dtype, self.model.device), self._cache
        if old is None or old.batch_size < batch or old.capacity < length or (old.k.dtype, old.k.device) != like:
            capacity = -(-length // CACHE_GRANULARITY) * CACHE_GRANULARITY
            self._cache = self.model.decoder.new_cache(batch, capacity)
        assert self._cache is not None
        return self._cache


def _run(session: Session, count: int, streamer: Streamer | None) -> list[GenerationOutput]:
    """Run a session's ``count`` requests to their ends; their outputs."""
    outputs: dict[int, GenerationOutput] = {}
    while len(session):
        for update in session.step():
            if update.error is not None:
                raise update.error
            if streamer is not None:
                streamer.put(torch.tensor(update.tokens))
            if update.output is not None:
                outputs[update.request_id] = update.output
    if streamer is not None:
        streamer.end()
    return [outputs[index] for index in range(count)]


def _resolve_draft_head(draft_head: str | DraftHead, model: LayerSkipModel) -> EarlyExitHead:
    if isinstance(draft_head, DraftHead):
        return draft_head.of(model)
    if draft_head == "int8":
        return model.head.quantize()
    if draft_head == "full":
        return model.head
    raise ValueError(f"draft_head must be 'full', 'int8' or a DraftHead, got {draft_head!r}")


def _of_config(model: Any, name: str) -> Any:
    """The generation config knows best; a model without one has a config."""
    for config in (getattr(model, "generation_config", None), model.config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
