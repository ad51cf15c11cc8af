"""The decoder: what a user makes of a model, and calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..models import EarlyExitHead, LayerSkipModel, SharedKVCache
from . import graph, validation
from .controller import Controller, Sizes, default_exits
from .draft_head import DraftHead, head_of
from .graph import Graphs
from .logits import LogitsProcessor
from .output import GenerationOutput, Streamer
from .reading import PROMPT_TOKENS_PER_STEP
from .request import Defaults
from .sampling import SamplingParams, params_of_each
from .sequence import StopRule
from .session import Session
from .text import SequenceText, stop_rules

CACHE_GRANULARITY = 256


class SelfSpeculativeDecoder:
    """Decoding in which a model's early layers draft and its remaining layers verify (LayerSkip).

    Greedy tokens are, bit for bit, those of the full model alone; sampled ones have exactly its distribution.

    Parameters
    ----------
    model : transformers.PreTrainedModel or LayerSkipModel
        Its weights are shared, not copied.
    exit_layer : int or "auto"
        E: layers [0, E) draft. From 1 to L - 1; "auto" picks by measured speed, see `Controller`.
    num_speculations : int or "auto"
        K: the tokens that a round drafts.
    max_seq_len : int, optional
        The longest prompt and continuation; by default what the model was made for.
    draft_head : {"full", "int8"} or DraftHead
        What chooses the drafts: the model's head, an int8 copy of it, or int8 rows of a part of the vocabulary.
    exit_choices : sequence of int, optional
        What "auto" picks the exit layer from; by default an eighth, a quarter, a half and three quarters of the layers.
    draft_threshold : float
        In [0, 1]. A draft ends early where the exit is not sure of its tokens, see `Session.add`.

    Attributes
    ----------
    controller : Controller
        Picks in the place of "auto". It learns from every call and session.

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
        draft_threshold: float = 0.0,
    ) -> None:
        self.model: LayerSkipModel = model if isinstance(model, LayerSkipModel) else models.adapt(model)
        layers = self.model.num_layers
        validation.exit_layer_or_auto(exit_layer, layers)
        self.exit_layer, self.num_speculations = exit_layer, num_speculations
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.max_seq_len = validation.max_seq_len(max_seq_len, positions)
        validation.num_speculations_or_auto(num_speculations, validation.MAX_NUM_SPECULATIONS)
        self.draft_threshold = validation.real("draft_threshold", draft_threshold, 0.0, 1.0)
        self.tokenizer: Any = None
        self.draft_head: EarlyExitHead = head_of(draft_head, self.model)
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
        draft_threshold: float = 0.0,
    ) -> SelfSpeculativeDecoder:
        """Load a model by directory or hub name; its tokenizer becomes ``decoder.tokenizer``."""
        model, tokenizer = models.load(name_or_dir, dtype=dtype)
        decoder = cls(model, exit_layer, num_speculations, max_seq_len, draft_head, exit_choices, draft_threshold)
        decoder.tokenizer = tokenizer
        return decoder

    @property
    def defaults(self) -> Defaults:
        """How a session of this decoder decodes requests that do not say otherwise."""
        return Defaults(
            self.exit_layer,
            self.num_speculations,
            self.draft_threshold,
            self.eos_token_id,
            self.draft_head,
            self.controller,
        )

    def open_session(
        self,
        max_batch: int,
        *,
        max_seq_len: int | None = None,
        num_speculations: int | str | None = None,
        generator: torch.Generator | None = None,
        prompt_tokens_per_step: int | None = PROMPT_TOKENS_PER_STEP,
        max_waiting: int | None = None,
    ) -> Session:
        """Open a session with a cache of its own, for requests that come and go.

        Parameters
        ----------
        max_batch : int
            How many requests run at once; the others wait.
        max_seq_len : int, optional
            The longest prompt and continuation of a request; by default the decoder's. On the CPU memory is taken as
            sequences grow; on a card all of it at once.
        num_speculations : int or "auto", optional
            The largest that a request may ask for; by default the decoder's.
        generator : torch.Generator, optional
            Draws the seeds of requests that have none; by default torch's own generator.
        prompt_tokens_per_step : int, optional
            How many tokens of prompts a step reads while requests run. None: all, for the most tokens a second.
        max_waiting : int, optional
            How many requests may wait beyond those for which there are slots; by default any number.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        MemoryError
            If the cache does not fit.
        """
        validation.at_least_one("max_batch", max_batch)
        length = self.max_seq_len
        if max_seq_len is not None:
            length = validation.integer_in("max_seq_len", max_seq_len, 1, self.max_seq_len)
        most = self._max_speculations(num_speculations)
        with torch.inference_mode(False):
            cache = self.model.decoder.new_cache(max_batch, length + most + 1)
        graphs = graph.for_device(self.model.device)
        return Session(
            self.model,
            cache,
            self.defaults,
            length,
            most,
            generator,
            graphs=graphs,
            prompt_tokens_per_step=prompt_tokens_per_step,
            max_waiting=max_waiting,
        )

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
        draft_threshold: float | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor | None] | None = None,
        should_stop: StopRule | Sequence[StopRule | None] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        pad_token_id: int | None = None,
    ) -> GenerationOutput:
        """Continue prompts, each as if it were alone.

        Parameters
        ----------
        input_ids : Tensor [B, N], int64, or sequence of prompts
            Each row of a tensor is a prompt. Prompts of different lengths are given as a list of tensors [N] or lists
            of int.
        max_new_tokens : int
            For each prompt.
        strategy, exit_layer, num_speculations, draft_threshold
            As in `Session.add`.
        eos_token_id : int or sequence of int, optional
            What ends a sequence; by default what the model's generation config says. With an empty list nothing does.
        streamer : Streamer, optional
            As in transformers: ``put`` is called with the prompt, then with each group of new tokens, and ``end``
            after them. For one prompt only.
        sampling : SamplingParams, or one for each prompt
            By default greedy. If all prompts share one that has a seed, prompt b gets the seed ``seed + b``.
        generator : torch.Generator, optional
            Draws the seeds of prompts that have none; by default torch's own generator.
        logits_processor, should_stop : callable, or one (or None) for each prompt
            As in `Session.add`.
        stop_strings : str or sequence of str, optional
            A sequence ends with the token that completes one of them in its new text; needs ``decoder.tokenizer``.
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
        batch = len(prompts)
        if streamer is not None and batch > 1:
            raise ValueError(f"a streamer takes one prompt, got a batch of {batch}")
        pad = self._pad(pad_token_id, eos_token_id)
        session = self._session_for_call(prompts, max_new_tokens, num_speculations, generator)
        rules = validation.one_each("should_stop", should_stop, batch)
        if stop_strings is not None:
            rules = stop_rules(self.tokenizer, stop_strings, prompts, rules)
        processors = validation.one_each("logits_processor", logits_processor, batch)
        each = zip(prompts, params_of_each(sampling, batch), processors, rules, strict=True)
        for prompt, params, processor, rule in each:
            session.add(
                prompt,
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
        return GenerationOutput.of_batch(_run(session, batch, streamer), pad)

    def stream(
        self,
        prompt: str | Tensor | Sequence[int],
        max_new_tokens: int = 128,
        *,
        stop_strings: str | Sequence[str] = (),
        tokenizer: Any = None,
        skip_special_tokens: bool = True,
        include_stop_string: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Continue a prompt, and yield the text in pieces as they become certain.

        It stops at the first token that completes a stop string, also within a round's accepted drafts. Leaving the
        loop ends the generation.

        Parameters
        ----------
        prompt : str, Tensor [N] or [1, N], or sequence of int
        max_new_tokens : int
        stop_strings : str or sequence of str
            The text ends before the first of them.
        tokenizer : transformers.PreTrainedTokenizerBase, optional
            By default the decoder's own.
        skip_special_tokens : bool
        include_stop_string : bool
            The text ends after the stop string.
        generator : torch.Generator, optional
            As in `open_session`.
        **options
            As in `Session.add`: ``sampling``, ``eos_token_id``, ``exit_layer``, …

        Returns
        -------
        iterator of str

        Raises
        ------
        ValueError, TypeError
            With the offending value, before the first piece.
        FloatingPointError
            If logits are not finite.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("tokenizer must be given for a decoder that was not made with from_pretrained")
        text = SequenceText(tokenizer, stop_strings, skip_special_tokens, include_stop_string)
        if isinstance(prompt, str):
            prompt = tokenizer(prompt).input_ids
        ids = validation.prompt(prompt, self.model.vocab_size, self.model.device)[0].tolist()
        text.start_after(ids)
        ready: list[str] = []

        def ends(tokens: list[int]) -> bool:
            ready.append(text.push(tokens[-1]))
            return text.stopped

        validation.at_least_one("max_new_tokens", max_new_tokens)
        length = validation.length(len(ids), max_new_tokens, self.max_seq_len)
        most = options.get("num_speculations")
        session = self.open_session(1, max_seq_len=length, num_speculations=most, generator=generator)
        session.add(ids, max_new_tokens, should_stop=ends, **options)
        return _pieces(session, text, ready)

    def _session_for_call(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int,
        num_speculations: int | str | None,
        generator: torch.Generator | None,
    ) -> Session:
        """A session of one call of `generate`, over the cache that all calls share."""
        most = self._max_speculations(num_speculations)
        longest = max(len(one) if isinstance(one, (list, tuple)) else one.numel() for one in prompts)
        validation.at_least_one("max_new_tokens", max_new_tokens)
        total = validation.length(longest, max_new_tokens, self.max_seq_len)
        cache = self._shared_cache(len(prompts), total + most + 1)
        return Session(self.model, cache, self.defaults, total, most, generator, graphs=self._shared_graphs())

    def _max_speculations(self, num_speculations: int | str | None) -> int:
        """The most drafts of a round. The cache needs room for them."""
        value = self.num_speculations if num_speculations is None else num_speculations
        most = validation.num_speculations_or_auto(value, validation.MAX_NUM_SPECULATIONS)
        return self.controller.max_speculations if most is None else most

    def _pad(self, pad_token_id: int | None, eos_token_id: int | Sequence[int] | None) -> int:
        if pad_token_id is not None:
            return validation.integer_in("pad_token_id", pad_token_id, 0, self.model.vocab_size - 1)
        if self._pad_token_id is not None:
            return self._pad_token_id
        stops = self.eos_token_id if eos_token_id is None else eos_token_id
        return min(validation.stop_tokens(stops, self.model.vocab_size), default=0)

    def _shared_graphs(self) -> Graphs | None:
        """The recorded rounds over the shared cache, if the model is on a card."""
        graphs = graph.for_device(self.model.device)
        if graphs is not None and self._graphs is None:
            self._graphs = graphs
        return None if graphs is None else self._graphs

    @torch.inference_mode(False)
    def _shared_cache(self, batch: int, length: int) -> SharedKVCache:
        """A cache with room for so many sequences and positions: the last call's, if that is big enough.

        Its content lies beyond the lengths of the new sequences, so nobody reads it.
        """
        like, old = (self.model.dtype, self.model.device), self._cache
        if old is None or old.batch_size < batch or old.capacity < length or (old.k.dtype, old.k.device) != like:
            capacity = -(-length // CACHE_GRANULARITY) * CACHE_GRANULARITY
            self._cache = self.model.decoder.new_cache(batch, capacity)
        assert self._cache is not None
        return self._cache


def _run(session: Session, batch: int, streamer: Streamer | None) -> list[GenerationOutput]:
    """Run the ``batch`` requests of a session to their ends, and return their outputs."""
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
    return [outputs[index] for index in range(batch)]


def _pieces(session: Session, text: SequenceText, ready: list[str]) -> Iterator[str]:
    """Run a session's only request; ``ready`` holds the pieces that its stop rule got from ``text``."""
    while len(session):
        for update in session.step():
            if update.error is not None:
                raise update.error
            if update.reason == "eos":  # the one token that no rule is asked about
                ready.append(text.push(update.tokens[-1]))
            if update.finished:
                ready.append(text.finish())
            yield from filter(None, ready)
            ready.clear()


def _of_config(model: Any, name: str) -> Any:
    """The value in the model's generation config, or in its config where there is none."""
    for config in (getattr(model, "generation_config", None), model.config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None
