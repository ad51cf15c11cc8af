"""`SelfSpeculativeDecoder`: generate, stream, converse, open sessions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import models
from ..models import EarlyExitHead, Exit, LayerSkipModel
from ..models.hf_checks import unwrapped
from . import cuda_graphs, validation
from .adaptive import Controller
from .detokenizer import SequenceText, stop_rules
from .draft_model import DraftHead, Drafting, DraftingModel
from .draft_sources import EXIT, DraftSource, max_drafts, source_of
from .outputs import GenerationOutput, Streamer, Update
from .request import Clock, Defaults, StopRule
from .sampling import LogitsProcessor, SamplingParams, params_of_each
from .session import Session
from .tuning import tuned


def prompts_of(input_ids: Any, attention_mask: Any = None, tokenizer: Any = None) -> list[Any]:
    """The prompts of ``SelfSpeculativeDecoder.generate``, without padding.

    Parameters
    ----------
    input_ids : Tensor [B, N] or [N], str, or sequence of str, of prompts, or of int
    attention_mask : Tensor or nested sequence, optional
        Of the shape of ``input_ids``, 0 for padding, on the left or on the right of each prompt.
    tokenizer : callable, optional
        Reads strings.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """
    if isinstance(input_ids, str):
        input_ids = [input_ids]
    if isinstance(input_ids, (list, tuple)) and any(isinstance(one, str) for one in input_ids):
        if attention_mask is not None:
            raise ValueError("attention_mask goes with token ids; the prompts are strings")
        return [text_ids(one, tokenizer) for one in input_ids]
    if _is_one(input_ids):
        input_ids, attention_mask = [input_ids], None if attention_mask is None else [attention_mask]
    rows = validation.prompts(input_ids)
    return rows if attention_mask is None else _without_padding(rows, attention_mask)


def text_ids(text: Any, tokenizer: Any) -> list[int]:
    """The tokens of a string."""
    if not isinstance(text, str):
        raise TypeError(f"prompts are all strings or all token ids, got a string and {text!r}")
    if tokenizer is None:
        raise ValueError("a prompt that is a string needs a tokenizer: give tokenizer=, or set decoder.tokenizer")
    return tokenizer(text).input_ids


def requests_of(
    prompts: Sequence[Any], sampling: Any, logits_processor: Any, should_stop: Any, stop_strings: Any, tokenizer: Any
) -> list[dict[str, Any]]:
    """What `Session.add` is told of each prompt alone, by its names; the arguments are those of ``generate``.

    Raises
    ------
    ValueError, TypeError
        If there are not as many of something as prompts; or with the offending value.
    """
    count = len(prompts)
    rules = validation.one_each("should_stop", should_stop, count)
    if stop_strings is not None:
        rules = stop_rules(tokenizer, stop_strings, prompts, rules)
    processors = validation.one_each("logits_processor", logits_processor, count)
    each = zip(prompts, params_of_each(sampling, count), processors, rules, strict=True)
    names = ("prompt", "sampling", "logits_processor", "should_stop")
    return [dict(zip(names, values, strict=True)) for values in each]


def longest(prompts: Sequence[Any]) -> int:
    """The tokens of the longest of some prompts."""
    return max(len(one) if isinstance(one, (list, tuple)) else one.numel() for one in prompts)


def padding(given: int | None, of_model: int | None, stops: int | Sequence[int] | None, vocab_size: int) -> int:
    """The token that pads the rows of a result: as given, else the model's, else one that ends texts."""
    if given is not None:
        return validation.integer_in("pad_token_id", given, 0, vocab_size - 1)
    return min(validation.stop_tokens(stops, vocab_size), default=0) if of_model is None else of_model


def _is_one(input_ids: Any) -> bool:
    """Whether this is one prompt and not a batch."""
    if isinstance(input_ids, Tensor):
        return input_ids.dim() == 1
    return isinstance(input_ids, (list, tuple)) and bool(input_ids) and isinstance(input_ids[0], Integral)


def _without_padding(rows: list[Any], attention_mask: Any) -> list[Any]:
    if len(attention_mask) != len(rows):
        raise ValueError(f"attention_mask has {len(attention_mask)} rows for {len(rows)} prompts")
    return [_unmasked(number, *both) for number, both in enumerate(zip(rows, attention_mask, strict=True))]


def _unmasked(number: int, row: Any, mask: Any) -> Any:
    """The part of a prompt that its mask leaves."""
    mask = torch.as_tensor(mask)
    if mask.dim() != 1 or len(mask) != len(row):
        raise ValueError(f"attention_mask has shape {list(mask.shape)} for prompt {number}, of {len(row)} tokens")
    kept = mask.ne(0).nonzero().flatten().tolist()
    if not kept:
        raise ValueError(f"attention_mask hides all of prompt {number}")
    if kept[-1] - kept[0] + 1 != len(kept):
        hole = next(place for place in range(kept[0], kept[-1]) if not mask[place])
        raise ValueError(
            f"attention_mask has a hole at position {hole} of prompt {number}; it may hide padding before or after a "
            "prompt, but nothing inside it"
        )
    return row[kept[0] : kept[-1] + 1]


def updates_of(session: Session) -> Iterator[Update]:
    """Run a session until its requests have ended; an error of one of them is raised."""
    while len(session):
        for update in session.step():
            if update.error is not None:
                raise update.error
            yield update


def ended_in(session: Session) -> Iterator[tuple[int, GenerationOutput]]:
    """The ids and outputs of a session's requests, in the order in which they end."""
    return ((one.request_id, one.output) for one in updates_of(session) if one.output is not None)


def outputs_of(session: Session, request_ids: Sequence[int], streamer: Streamer | None) -> list[GenerationOutput]:
    """Run a session until its requests have ended, and return the outputs of these."""
    outputs: dict[int, GenerationOutput] = {}
    for update in updates_of(session):
        if streamer is not None:
            streamer.put(torch.tensor(update.tokens))
        if update.output is not None:
            outputs[update.request_id] = update.output
    if streamer is not None:
        streamer.end()
    return [outputs[request_id] for request_id in request_ids]


def pieces_of(session: Session, text: SequenceText, ready: list[str]) -> Iterator[str]:
    """Run a session's only request; ``ready`` holds the pieces that its stop rule got from ``text``."""
    for update in updates_of(session):
        if update.reason == "eos":  # the one token that no rule is asked about
            ready.append(text.push(update.tokens[-1]))
        if update.finished:
            ready.append(text.finish())
        yield from filter(None, ready)
        ready.clear()


class SelfSpeculativeDecoder:
    """Decoding in which a model's early layers draft and its remaining layers verify (LayerSkip).

    Greedy tokens are, bit for bit, those of the full model alone; sampled ones have exactly its distribution. Several
    threads may call one decoder at the same time: each call has a cache of its own.

    Parameters
    ----------
    model : transformers.PreTrainedModel or LayerSkipModel
        Its weights are shared, not copied. Each call sees what has become of it: a Hugging Face model with other
        parameters or modules, or of another dtype or device, is adapted anew.
    exit_layer : int or "auto", optional
        E: layers [0, E) draft. From 1 to L - 1; "auto" picks by measured speed, see `Controller`. By default that of
        ``exit``, or "auto".
    num_speculations : int or "auto"
        K: the tokens that a round drafts.
    max_seq_len : int, optional
        The longest prompt and continuation; by default what the model was made for, or its sliding window if that is
        shorter.
    draft_head : {"full", "int8"} or DraftHead, optional
        What chooses the drafts: the model's head, an int8 copy of it, or int8 rows of a part of the vocabulary. By
        default what ``exit`` says, or the model's head.
    exit_choices : sequence of int, optional
        What "auto" picks the exit layer from; by default an eighth, a quarter, a half and three quarters of the layers.
    draft_threshold : float
        In [0, 1]. A draft ends early where the exit is not sure of its tokens, see `Session.add`.
    draft_source : {"exit", "ngram", "auto"} or DraftSource
        Where drafts come from: layers [0, E); text that occurred before (`NgramSource`), which needs no exit; whichever
        of both is faster, or none, round by round; or a source of one's own.
    exit : Exit, str or Path, optional
        Drafts with layers [0, E) and blocks, a norm and a head of its own: an `Exit`, or where to `Exit.load` it from.

    Attributes
    ----------
    clock : callable
        Gives the time, in seconds, for statistics and the controller; `time.perf_counter`. A benchmark on a machine
        that others use may set `time.process_time`.

    Raises
    ------
    ValueError, TypeError
        With the offending value.
    """

    def __init__(
        self,
        model: Any,
        exit_layer: int | str | None = None,
        num_speculations: int | str = 4,
        max_seq_len: int | None = None,
        draft_head: str | DraftHead | None = None,
        exit_choices: Sequence[int] | None = None,
        draft_threshold: float = 0.0,
        draft_source: str | DraftSource = EXIT,
        exit: Exit | str | Path | None = None,
    ) -> None:
        model, drafting = unwrapped(model), Drafting.of(exit, draft_head)
        if drafting.exit is not None:
            exit_layer = validation.exit_layer_of_exit(exit_layer, drafting.exit.exit_layer)
        self.exit_layer = "auto" if exit_layer is None else exit_layer
        self.num_speculations = num_speculations
        self._drafting = DraftingModel(model, drafting, self.exit_layer, exit_choices)
        self.max_seq_len = validation.max_seq_len(max_seq_len, self.model.max_positions)
        validation.num_speculations_or_auto(num_speculations, validation.MAX_NUM_SPECULATIONS)
        self.draft_threshold = validation.real("draft_threshold", draft_threshold, 0.0, 1.0)
        self.draft_source = source_of(draft_source)
        self.clock: Clock = time.perf_counter
        self.tokenizer: Any = None
        self.eos_token_id: int | Sequence[int] | None = _of_config(model, "eos_token_id")
        self._pad_token_id = _of_config(model, "pad_token_id")

    @property
    def model(self) -> LayerSkipModel:
        """The model, and what drafts for it, as of the last call."""
        return self._drafting.model

    @property
    def controller(self) -> Controller:
        """What picks in the place of "auto". It learns from every call and session."""
        return self._drafting.controller

    @property
    def draft_head(self) -> EarlyExitHead:
        """What chooses the drafts."""
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
        """Load a model; its tokenizer becomes ``decoder.tokenizer``.

        Parameters
        ----------
        name_or_dir : str or Path
            As `layerskip.load` takes it.
        dtype : torch.dtype
        weights : str, optional
            As `layerskip.load` takes it: quantize plain weights, "int8", "int4", … Each is packed and freed in turn.
            Self-speculation is lossless for the quantized model.
        tuning : str or Path, optional
            What ``layerskip tune`` has written; by default what lies beside the model, if neither ``exit_layer`` nor
            ``exit`` is given. Options go before it.
        **options
            As the class takes them: ``exit_layer``, ``exit``, …
        """
        model, tokenizer = models.load(name_or_dir, dtype, weights)
        models.gather_weights(model)
        decoder = cls(model, **tuned(name_or_dir, model.config, tuning, options))
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
            self.controller,
            self.draft_source,
        )

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
        """Open a session with a cache of its own, for requests that come and go. It is for one thread at a time.

        Parameters
        ----------
        max_batch : int
            How many requests run at once; the others wait.
        max_seq_len : int, optional
            The longest prompt and continuation of a request; by default the decoder's.
        num_speculations : int or "auto", optional
            The largest that a request may ask for; by default the decoder's, and what its draft source proposes.
        generator : torch.Generator, optional
            Draws the seeds of requests that have none; by default torch's own generator.
        prompt_tokens_per_step : int, "auto" or None
            How many tokens of prompts a step reads while requests run. "auto": so many that a step takes about 2.25
            times as long as one without. None: all, for the most tokens a second.
        max_waiting : int, optional
            How many requests may wait beyond those for which there are slots; by default any number.

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        MemoryError
            If the cache does not fit.
        """
        model = self._drafting.follow().model
        validation.at_least_one("max_batch", max_batch)
        length = self.max_seq_len
        if max_seq_len is not None:
            length = validation.integer_in("max_seq_len", max_seq_len, 1, self.max_seq_len)
        most = self._max_speculations(num_speculations)
        with torch.inference_mode(False):
            cache = model.decoder.new_cache(max_batch, length + most + 1)
        graphs, bounds = cuda_graphs.for_device(model.device), (prompt_tokens_per_step, max_waiting)
        return Session(model, cache, self.defaults, length, most, generator, self.clock, graphs, *bounds)

    def generate(
        self,
        input_ids: str | Tensor | Sequence[int] | Sequence[str | Tensor | Sequence[int]],
        max_new_tokens: int = 128,
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
        input_ids : Tensor [B, N] or [N], int64, str, or sequence of prompts
            Each row of a tensor is a prompt. Prompts of different lengths are given as a list of tensors [N], of lists
            of int, or of strings.
        max_new_tokens : int
            For each prompt.
        strategy, exit_layer, num_speculations, draft_threshold, draft_source
            As in `Session.add`.
        eos_token_id : int or sequence of int, optional
            What ends a sequence; by default what the model's generation config says. With an empty list nothing does.
        streamer : Streamer, optional
            As in transformers: ``put`` is called with the prompt, then with each group of new tokens, and ``end``
            after them. For one prompt only.
        attention_mask : Tensor [B, N], optional
            0 for padding, which is on the left or on the right of a prompt and not part of it; 1 for the prompt.
        tokenizer : transformers.PreTrainedTokenizerBase, optional
            Reads prompts that are strings, and stop strings; by default the decoder's own.
        sampling : SamplingParams, or one for each prompt
            By default greedy. If all prompts share one that has a seed, prompt b gets the seed ``seed + b``.
        generator : torch.Generator, optional
            Draws the seeds of prompts that have none; by default torch's own generator.
        logits_processor, should_stop : callable, or one (or None) for each prompt
            As in `Session.add`.
        stop_strings : str or sequence of str, optional
            A sequence ends with the token that completes one of them in its new text; needs a tokenizer.
        pad_token_id : int, optional
            What pads the rows of the result; by default the model's padding token, else its first EOS token, else 0.

        Returns
        -------
        GenerationOutput

        Raises
        ------
        ValueError, TypeError
            With the offending value.
        UnsupportedModelError
            If the model has become one that cannot be adapted.
        FloatingPointError
            If logits are not finite; it names the layer and the position.
        """
        caches = self._drafting.follow()
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        prompts = prompts_of(input_ids, attention_mask, tokenizer)
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"a streamer takes one prompt, got a batch of {len(prompts)}")
        stops = self.eos_token_id if eos_token_id is None else eos_token_id
        pad = padding(pad_token_id, self._pad_token_id, stops, self.model.vocab_size)
        each = requests_of(prompts, sampling, logits_processor, should_stop, stop_strings, tokenizer)
        same: dict[str, Any] = {
            "strategy": strategy,
            "exit_layer": exit_layer,
            "num_speculations": num_speculations,
            "draft_threshold": draft_threshold,
            "draft_source": draft_source,
            "eos_token_id": eos_token_id,
        }
        validation.at_least_one("max_new_tokens", max_new_tokens)
        total = validation.length(longest(prompts), max_new_tokens, self.max_seq_len)
        most = self._max_speculations(num_speculations, draft_source)
        with caches.borrow(len(prompts), total + most + 1) as lent:
            session = Session(caches.model, lent.cache, self.defaults, total, most, generator, self.clock, lent.graphs)
            requests = [session.add(max_new_tokens=max_new_tokens, **one, **same) for one in each]
            if streamer is not None:
                streamer.put(torch.as_tensor(prompts[0]).cpu().view(1, -1))
            return GenerationOutput.of_batch(outputs_of(session, requests, streamer), pad)

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
        self._drafting.follow()
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("tokenizer must be given for a decoder that was not made with from_pretrained")
        text = SequenceText(tokenizer, stop_strings, skip_special_tokens, include_stop_string)
        if isinstance(prompt, str):
            prompt = text_ids(prompt, tokenizer)
        ids = validation.prompt(prompt, self.model.vocab_size, self.model.device)[0].tolist()
        text.start_after(ids)
        ready: list[str] = []

        def ends(tokens: list[int]) -> bool:
            ready.append(text.push(tokens[-1]))
            return text.stopped

        validation.at_least_one("max_new_tokens", max_new_tokens)
        length = validation.length(len(ids), max_new_tokens, self.max_seq_len)
        most = self._max_speculations(options.get("num_speculations"), options.get("draft_source"))
        session = self.open_session(1, max_seq_len=length, num_speculations=most, generator=generator)
        session.add(ids, max_new_tokens, should_stop=ends, **options)
        return pieces_of(session, text, ready)

    def _max_speculations(
        self, num_speculations: int | str | None, draft_source: str | DraftSource | None = None
    ) -> int:
        """The most drafts of a round. The cache needs room for them."""
        value = self.num_speculations if num_speculations is None else num_speculations
        most = validation.num_speculations_or_auto(value, validation.MAX_NUM_SPECULATIONS)
        most = self.controller.max_speculations if most is None else most
        return max(most, max_drafts(self.draft_source if draft_source is None else source_of(draft_source)))


def _of_config(model: Any, name: str) -> Any:
    """The value in the model's generation config, or in its config where there is none."""
    for config in (getattr(model, "generation_config", None), model.config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


class Conversation:
    """Turns that continue each other.

    A turn reads only what it adds, and gives the tokens that `SelfSpeculativeDecoder.generate` would give for the whole
    conversation as its prompt.

    Parameters
    ----------
    decoder : SelfSpeculativeDecoder
    max_seq_len : int, optional
        The longest conversation; by default the decoder's.
    num_speculations : int or "auto", optional
        The largest that a turn may ask for; by default the decoder's.

    Attributes
    ----------
    tokens : list of int
        All prompts and continuations so far. To take a turn back, cut it off.
    """

    def __init__(
        self,
        decoder: SelfSpeculativeDecoder,
        max_seq_len: int | None = None,
        num_speculations: int | str | None = None,
    ) -> None:
        self._model = decoder.model
        self._session = decoder.open_session(1, max_seq_len=max_seq_len, num_speculations=num_speculations)
        self.tokens: list[int] = []

    def generate(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int = 128,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Take a turn.

        Parameters
        ----------
        prompt : Tensor [N] or [1, N], or sequence of int
            What follows the tokens so far.
        max_new_tokens : int
        streamer : Streamer, optional
            As in `SelfSpeculativeDecoder.generate`.
        **options
            As in `Session.add`: ``sampling``, ``eos_token_id``, ``should_stop``, …

        Returns
        -------
        GenerationOutput
            ``sequences`` [1, N + new] are the whole conversation, ``stats.reused`` the tokens that were not read again.

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As `SelfSpeculativeDecoder.generate`; the tokens stay as they were.
        """
        ids = validation.prompt(prompt, self._model.vocab_size, self._model.device)
        whole = self.tokens + ids[0].tolist()
        request = self._session.add(whole, max_new_tokens, keep=True, **options)
        if streamer is not None:
            streamer.put(ids.cpu())
        try:
            (output,) = outputs_of(self._session, [request], streamer)
        except BaseException:
            if len(self._session):
                self._session.remove(request)
            raise
        self.tokens = output.sequences[0].tolist()
        return output
