"""`SelfSpeculativeDecoder`: generate, stream, open sessions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import models
from .._autograd_modes import InferenceMode, keeps_grad_mode
from ..models import EarlyExitHead, Exit, LayerSkipModel
from ..models.hf_checks import unwrapped
from . import cuda_graphs, validation
from .adaptive import Controller
from .detokenizer import SequenceText, check_stop_strings, stop_rules
from .draft_model import DraftHead, DraftModel
from .draft_sources import DraftSource, max_drafts
from .outputs import GenerationOutput, Streamer
from .request import Clock, Prompt, Prompts, RequestDefaults, StopRule
from .sampling import LogitsProcessor, SamplingParams, params_of_each
from .session import Session
from .tuning import tuned


class SelfSpeculativeDecoder:
    """Self-speculative decoding: a model's early layers draft, its remaining layers verify (LayerSkip).

    Greedy tokens have the same bits as those of the full model alone; sampled tokens have exactly its distribution.
    Several threads may share a decoder: each call has a cache of its own.

    Parameters
    ----------
    model : transformers.PreTrainedModel or LayerSkipModel
        Its weights are shared, not copied. A Hugging Face model whose parameters, modules, dtype or device have changed
        is adapted anew at the next call.
    exit_layer : int or "auto", optional
        E in 1 … L - 1: layers [0, E) draft. "auto", the default, picks by measured speed, round by round, and does not
        draft where that is faster, see `Controller`. With ``exit`` it is the layer of that exit.
    num_speculations : int or "auto", optional
        K: draft tokens of a round. By default "auto", but 4 if ``exit_layer`` is an int.
    max_seq_len : int, optional
        Longest prompt and continuation; by default the model's positions, or its sliding window if that is shorter.
    draft_head : {"full", "int8"} or DraftHead, optional
        Head that chooses the drafts: the model's head, an int8 copy, or int8 rows of a part of the vocabulary. By
        default the head of ``exit``, or the model's.
    exit_choices : sequence of int, optional
        Layers that "auto" picks from; by default an eighth, a quarter, a half and three quarters of the layers.
    draft_threshold : float
        In [0, 1]. A draft ends early at improbable tokens, see `Session.add`.
    draft_source : {"exit", "ngram", "auto"} or DraftSource, optional
        Where drafts come from: layers [0, E); earlier text (`NgramSource`), which needs no exit; whichever is faster,
        round by round; or a source of one's own. By default "auto", but "exit" if E or K is an int.
    exit : Exit, str or Path, optional
        Trained exit, or where to `Exit.load` it from: draft with layers [0, E) and draft layers, a norm and a head of
        its own. "auto", the default, takes the exit that an installed package ships for exactly these weights, unless
        the drafts are specified by ``exit_layer``, ``exit_choices`` or ``draft_head``.

    Attributes
    ----------
    defaults : RequestDefaults
        Options of requests that do not specify them.
    clock : callable
        Seconds for statistics and the controller; `time.perf_counter`. Set `time.process_time` to benchmark on a busy
        machine.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """

    def __init__(
        self,
        model: Any,
        exit_layer: int | str | None = None,
        num_speculations: int | str | None = None,
        max_seq_len: int | None = None,
        draft_head: str | DraftHead | None = None,
        exit_choices: Sequence[int] | None = None,
        draft_threshold: float = 0.0,
        draft_source: str | DraftSource | None = None,
        exit: Exit | str | Path | None = "auto",
    ) -> None:
        model = unwrapped(model)
        self._draft_model = DraftModel(model, exit_layer, exit_choices, exit, draft_head)
        self.draft_threshold = validation.real("draft_threshold", draft_threshold, 0.0, 1.0)
        self.eos_token_id: int | Sequence[int] | None = _of_config(model, "eos_token_id")
        self.defaults = RequestDefaults(exit_layer, num_speculations, draft_threshold, draft_source, self.eos_token_id)
        options = self.defaults.complete()
        validation.num_speculations_or_auto(options.num_speculations, validation.MAX_NUM_SPECULATIONS)
        self.max_seq_len = validation.max_seq_len(max_seq_len, self.model.max_positions)
        self.num_speculations, self.draft_source = options.num_speculations, options.draft_source
        self.clock: Clock = time.perf_counter
        self.tokenizer: Any = None
        self._pad_token_id = _of_config(model, "pad_token_id")

    @property
    def model(self) -> LayerSkipModel:
        """Model and exit, as of the last call."""
        return self._draft_model.model

    @property
    def exit_layer(self) -> int | str:
        """E, "auto" if the controller picks it."""
        return self._draft_model.exit_layer

    @property
    def controller(self) -> Controller:
        """Picks the values of "auto". It learns from every call and session."""
        return self._draft_model.controller

    @property
    def draft_head(self) -> EarlyExitHead:
        """Head that chooses the drafts."""
        return self.model.draft_head

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a SelfSpeculativeDecoder can't be pickled or copied; pickle the model, and make a decoder of it where it "
            "is unpickled"
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        weights: str | None = None,
        tuning: str | Path | None = None,
        **options: Any,
    ) -> SelfSpeculativeDecoder:
        """Load a model and its tokenizer, ``decoder.tokenizer``.

        Parameters
        ----------
        name_or_dir, dtype, weights
            As in `layerskip.load`. Self-speculation is lossless for the quantized model, too.
        tuning : str or Path, optional
            File of ``layerskip tune``; by default the one beside the model, unless ``exit_layer`` or ``exit`` is given.
            Explicit options take precedence.
        **options
            As of the class: ``exit_layer``, ``exit``, …
        """
        model, tokenizer = models.load(name_or_dir, dtype, weights)
        models.gather_weights(model)
        decoder = cls(model, **tuned(name_or_dir, model.config, tuning, options))
        decoder.tokenizer = tokenizer
        return decoder

    @keeps_grad_mode
    def open_session(
        self,
        max_batch: int,
        *,
        max_seq_len: int | None = None,
        num_speculations: int | str | None = None,
        generator: torch.Generator | None = None,
        prompt_tokens_per_step: int | str | None = "auto",
        max_waiting: int | None = None,
    ) -> Session:
        """Open a session with a cache of its own, for requests that come and go. One thread at a time may use it.

        Parameters
        ----------
        max_batch : int
            Requests that run at once; others wait.
        max_seq_len : int, optional
            Longest prompt and continuation of a request; by default the decoder's.
        num_speculations : int or "auto", optional
            Largest K of a request; by default the decoder's, and what its draft source proposes.
        generator : torch.Generator, optional
            Draws the seeds of requests without one; by default torch's own.
        prompt_tokens_per_step : int, "auto" or None
            Prompt tokens that a step reads while requests run (chunked prefill). "auto": as many as keep a step within
            about 2.25 times its usual length. None: all, for the highest throughput.
        max_waiting : int, optional
            Requests that may wait beyond those for which there are slots; by default any number.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        MemoryError
            If the cache does not fit.
        """
        model = self._draft_model.follow().model
        validation.at_least_one("max_batch", max_batch)
        length = self.max_seq_len
        if max_seq_len is not None:
            length = validation.integer_in("max_seq_len", max_seq_len, 1, self.max_seq_len)
        max_speculations = self._max_speculations(num_speculations=num_speculations)
        with InferenceMode(False):
            cache = model.decoder.new_cache(max_batch, length + max_speculations + 1)
        return Session(
            model, cache, self.defaults, self.controller, length, max_speculations, generator, self.clock,
            cuda_graphs.for_device(model.device), prompt_tokens_per_step, max_waiting, self.tokenizer,
        )  # fmt: skip

    @keeps_grad_mode
    def generate(
        self,
        input_ids: Prompts,
        max_new_tokens: int | None = 128,
        strategy: str = "self_speculative",
        exit_layer: int | str | None = None,
        num_speculations: int | str | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
        *,
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        tokenizer: Any = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        generator: torch.Generator | None = None,
        draft_threshold: float | None = None,
        draft_source: str | DraftSource | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor | None] | None = None,
        should_stop: StopRule | Sequence[StopRule | None] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        pad_token_id: int | None = None,
    ) -> GenerationOutput:
        """Continue prompts, each as if it were alone.

        Parameters
        ----------
        input_ids : str, Tensor [N] or [B, N], numpy array, BatchEncoding, or sequence of int or of prompts
            Texts or tokens (int64 or int32). Each row of a tensor is a prompt; prompts of different lengths are a list,
            or padded with an ``attention_mask``, which a tokenizer's BatchEncoding has.
        max_new_tokens : int, optional
            For each prompt; None decodes up to ``max_seq_len``, for which the KV cache then has room.
        strategy, exit_layer, num_speculations, draft_threshold, draft_source
            As in `Session.add`.
        eos_token_id : int or sequence of int, optional
            By default that of the model's generation config; none with an empty list.
        streamer : Streamer, optional
            As in transformers; for one prompt only.
        attention_mask : Tensor [B, N], optional
            0 for padding on the left or on the right of a prompt, 1 for the prompt.
        tokenizer : transformers.PreTrainedTokenizerBase, optional
            Encodes strings, and decodes for stop strings; by default the decoder's own.
        sampling : SamplingParams, or one for each prompt
            By default greedy. If all prompts share one with a seed, prompt b gets the seed ``seed + b``.
        generator : torch.Generator, optional
            Draws the seeds of prompts without one; by default torch's own.
        logits_processor, should_stop : callable, or one (or None) for each prompt
            As in `Session.add`.
        stop_strings : str or sequence of str, optional
            End a sequence with the token that completes one of them in its new text; needs a tokenizer.
        pad_token_id : int, optional
            Padding of the result; by default the model's padding token, else its first EOS token, else 0.

        Returns
        -------
        GenerationOutput

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        UnsupportedModelError
            If the model can no longer be adapted.
        FloatingPointError
            If logits are not finite; it names the layer and the position.
        """
        caches = self._draft_model.follow()
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        model = caches.model
        prompts = validation.prompts(input_ids, model.vocab_size, model.device, tokenizer, attention_mask)
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"a streamer takes one prompt, got a batch of {len(prompts)}")
        pad = self._padding(pad_token_id, self.eos_token_id if eos_token_id is None else eos_token_id)
        rules = validation.one_each("should_stop", should_stop, len(prompts))
        if stop_strings := check_stop_strings(stop_strings):
            rules = stop_rules(tokenizer, stop_strings, prompts, rules)
        params = params_of_each(sampling, len(prompts))
        processors = validation.one_each("logits_processor", logits_processor, len(prompts))
        longest = max(one.shape[1] for one in prompts)
        length = validation.length(longest, max_new_tokens, self.max_seq_len)
        max_speculations = self._max_speculations(
            strategy=strategy, exit_layer=exit_layer, num_speculations=num_speculations, draft_source=draft_source
        )
        with caches.borrow(len(prompts), length + max_speculations + 1) as (cache, graphs):
            session = Session(
                model, cache, self.defaults, self.controller, length, max_speculations, generator, self.clock, graphs,
                tokenizer=tokenizer,
            )  # fmt: skip
            requests = [
                session.add(
                    prompt, max_new_tokens, strategy=strategy, exit_layer=exit_layer, num_speculations=num_speculations,
                    draft_threshold=draft_threshold, draft_source=draft_source, eos_token_id=eos_token_id,
                    sampling=own_params, logits_processor=processor, should_stop=rule,
                )
                for prompt, own_params, processor, rule in zip(prompts, params, processors, rules, strict=True)
            ]  # fmt: skip
            if streamer is not None:
                streamer.put(prompts[0].cpu())
            outputs: dict[int, GenerationOutput] = {}
            for update in session.run(streamer):
                if update.output is not None:
                    outputs[update.request_id] = update.output
            return GenerationOutput.of_batch([outputs[request_id] for request_id in requests], pad)

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = 128,
        *,
        stop_strings: str | Sequence[str] = (),
        tokenizer: Any = None,
        skip_special_tokens: bool = True,
        include_stop_string: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Continue a prompt, and yield the text in pieces as they become final.

        It ends at the first token that completes a stop string, even within a round's accepted drafts. Leaving the loop
        ends the generation.

        Parameters
        ----------
        prompt : str, Tensor [N] or [1, N], numpy array, BatchEncoding, or sequence of int
        max_new_tokens : int, optional
            None decodes up to ``max_seq_len``.
        stop_strings : str or sequence of str
            The text ends before the first of them.
        tokenizer : transformers.PreTrainedTokenizerBase, optional
            By default the decoder's own.
        skip_special_tokens : bool
        include_stop_string : bool
            End the text after the stop string.
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
        self._draft_model.follow()
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("tokenizer must be given for a decoder that was not made with from_pretrained")
        text = SequenceText(tokenizer, stop_strings, skip_special_tokens, include_stop_string)
        ids = validation.prompt(prompt, self.model.vocab_size, self.model.device, tokenizer)
        text.start_after(ids[0].tolist())
        pieces: list[str] = []

        def stops(new_tokens: list[int]) -> bool:
            pieces.append(text.push(new_tokens[-1]))
            return text.stopped

        length = validation.length(ids.shape[1], max_new_tokens, self.max_seq_len)
        names = ("strategy", "exit_layer", "num_speculations", "draft_source")
        drafting = {name: options.get(name) for name in names}
        max_speculations = self._max_speculations(**drafting)
        session = self.open_session(1, max_seq_len=length, num_speculations=max_speculations, generator=generator)
        session.add(ids, max_new_tokens, should_stop=stops, **options)

        def run() -> Iterator[str]:
            for update in session.run():
                if update.reason == "eos":  # the only token that no rule sees
                    pieces.append(text.push(update.tokens[-1]))
                if update.finished:
                    pieces.append(text.finish())
                yield from filter(None, pieces)
                pieces.clear()

        return run()

    def _max_speculations(self, **given: Any) -> int:
        """Return the largest K of a round; the cache needs room for it."""
        options = self.defaults.updated(self.model, validation.MAX_NUM_SPECULATIONS, **given)
        num_speculations = options.num_speculations
        limit = self.controller.max_speculations if num_speculations == "auto" else int(num_speculations)
        return max(limit, max_drafts(options.draft_source))

    def _padding(self, given: int | None, stops: int | Sequence[int] | None) -> int:
        """Return the token that pads results: as given, else the model's, else an EOS token."""
        vocab_size = self.model.vocab_size
        if given is not None:
            return validation.integer_in("pad_token_id", given, 0, vocab_size - 1)
        if self._pad_token_id is not None:
            return self._pad_token_id
        return min(validation.stop_tokens(stops, vocab_size), default=0)


def _of_config(model: Any, name: str) -> Any:
    """Return a value of the model's generation config or, for a model without one, of its config."""
    generation_config = getattr(model, "generation_config", None)
    return getattr(model.config if generation_config is None else generation_config, name, None)
