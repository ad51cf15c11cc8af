"""``layerskip.generate``: what ``model.generate(custom_generate=…)`` calls to decode."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from ..decoding import DraftHead, DraftSource, SamplingParams, SelfSpeculativeDecoder
from ..models import Exit
from ..models.hf_checks import unwrapped
from . import compatibility
from .compatibility import BatchRow, BatchStopping, ColumnStreamer, RowProcessor, Scores, check_cache, rows_of


class _Kept(NamedTuple):
    drafting: tuple[str | DraftHead | None, Exit | str | Path | None]
    decoder: SelfSpeculativeDecoder


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
_lock = Lock()


def decoder_of(
    model: Any, draft_head: str | DraftHead | None, exit: Exit | str | Path | None = "auto"
) -> SelfSpeculativeDecoder:
    """The decoder of ``model``, kept as long as the model lives; a new one for another head or exit.

    Several calls may use it at the same time.
    """
    with _lock:
        kept = _kept.get(model)
        if kept is None or kept.drafting != (draft_head, exit):
            decoder = SelfSpeculativeDecoder(model, draft_head=draft_head, exit=exit)
            kept = _kept[model] = _Kept((draft_head, exit), decoder)
        return kept.decoder


_METHOD = "_extract_generation_mode_kwargs"


def patch_generation_mixin(function: Callable[..., Any]) -> None:
    """Pass ``streamer``, ``tokenizer``, ``assistant_model`` and ``synced_gpus`` to ``custom_generate=function``.

    ImportError if the installed transformers calls ``custom_generate`` in another way.
    """
    import transformers
    from transformers.generation.utils import GenerationMixin

    original = getattr(GenerationMixin, _METHOD, None)
    if original is None:
        raise ImportError(
            f"transformers {transformers.__version__} has no GenerationMixin.{_METHOD}, through which "
            "layerskip.generate is given the streamer and the tokenizer; 4.57 to 5.24 have it"
        )

    @functools.wraps(original)
    def extract(
        self: Any, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        dropped = {
            "tokenizer": kwargs.get("tokenizer"),
            "assistant_model": assistant_model,
            "streamer": streamer,
            "synced_gpus": synced_gpus,
        }
        found = original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        if getattr(custom_generate, "func", custom_generate) is function:  # itself, or a partial of it
            check_cache(kwargs)  # later it looks like the one that transformers makes
            found |= {name: value for name, value in dropped.items() if value is not None}
        return found

    setattr(GenerationMixin, _METHOD, extract)


def generate(
    model: Any,
    input_ids: Tensor | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool | None = None,
    streamer: Any = None,
    *,
    exit_layer: int | str | None = None,
    num_speculations: int | str | None = None,
    draft_head: str | DraftHead | None = None,
    draft_threshold: float = 0.0,
    draft_source: str | DraftSource | None = None,
    exit: Exit | str | Path | None = "auto",
    tokenizer: Any = None,
    assistant_model: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Self-speculative decoding as the ``custom_generate`` of ``model.generate``.

    ``model.generate(**inputs, custom_generate=layerskip.generate, exit_layer=6, num_speculations=5)`` takes the
    arguments of ``model.generate`` and returns the same: greedily the same tokens (up to rounding), or samples of the
    same distribution. Logits processors must be functions of history and logits, because they are called for drafts,
    too, and for each row at its own pace. What cannot be honoured is refused by name.
    ``layerskip.generate(model, **inputs, …)`` is the same call.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of one of `layerskip.supported_architectures`. The first call makes a decoder for it, which is kept.
    input_ids : Tensor [B, N], int64
    logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, tokenizer, assistant_model
        As ``model.generate`` takes them.
    exit_layer, num_speculations, draft_head, draft_threshold, draft_source, exit
        As in `SelfSpeculativeDecoder`: by default all is picked by measured speed.
    **model_kwargs
        ``attention_mask`` [B, N], and what ``model.generate`` adds. In a direct call all arguments of it.

    Returns
    -------
    Tensor [B, N + new] or GenerateDecoderOnlyOutput
        The latter with ``return_dict_in_generate``.

    Raises
    ------
    ValueError, TypeError
        With the offending option and value.
    UnsupportedModelError
        If the model is not supported.
    FloatingPointError
        If logits are not finite.
    """
    speculation = {
        "exit_layer": exit_layer, "num_speculations": num_speculations, "draft_threshold": draft_threshold,
        "draft_source": draft_source,
    }  # fmt: skip
    if not hasattr(generation_config, "_eos_token_tensor"):  # not prepared: a direct call
        model = unwrapped(model)
        if not isinstance(model, GenerationMixin):
            raise TypeError(f"model must be a transformers model with generate, got {type(model).__name__}")
        arguments = {
            **speculation, "draft_head": draft_head, "exit": exit, "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria, "generation_config": generation_config, "synced_gpus": synced_gpus,
            "streamer": streamer, "tokenizer": tokenizer, "assistant_model": assistant_model, **model_kwargs,
            "input_ids": input_ids,
        }  # fmt: skip
        given = {name: value for name, value in arguments.items() if value is not None}
        return model.generate(custom_generate=generate, **given)
    for name, value in (("synced_gpus", synced_gpus), ("assistant_model", assistant_model)):
        if value:
            raise ValueError(
                f"{name} can't be honoured by layerskip.generate: one model drafts for itself, on one device"
            )
    compatibility.check_config(generation_config)
    compatibility.check_arguments(model_kwargs)
    compatibility.check_processors(logits_processor)
    assert input_ids is not None  # prepared
    if exit == "auto" and exit_layer not in (None, "auto"):
        exit = None  # the model's own layers draft
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
    compatibility.check_positions(model_kwargs.get("position_ids"), mask)
    call = _Call(rows_of(input_ids, mask), logits_processor, stopping_criteria, generation_config)
    return call.run(decoder_of(model, draft_head, exit), streamer, speculation)


patch_generation_mixin(generate)


class _Call:
    def __init__(self, rows: list[BatchRow], processors: Sequence[Any], criteria: Sequence[Any], config: Any) -> None:
        self._rows, self._config = rows, config
        self._keeps_scores = bool(config.return_dict_in_generate and config.output_scores)
        self._keeps_logits = bool(config.return_dict_in_generate and config.output_logits)
        self._pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        # Rows end at a length, at EOS tokens, or by other criteria.
        lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        self._max_new_tokens = min(lengths, default=config.max_length) - len(rows[0].padded)
        eos = [one.eos_token_id.reshape(-1).tolist() for one in criteria if type(one) is EosTokenCriteria]
        others = [one for one in criteria if type(one) not in (EosTokenCriteria, MaxLengthCriteria)]
        has_eos = any(hasattr(one, "eos_token_id") for one in criteria)
        self._stopping = BatchStopping(others, frozenset().union(*eos), not has_eos, len(rows))
        # Tokens are chosen with sampling parameters if these suffice, else by the processors.
        do_sample, keeps = bool(config.do_sample), self._keeps_scores or self._keeps_logits
        padding = [row.padding for row in rows]
        sampling = None if keeps else compatibility.as_sampling(processors, do_sample, padding)
        self._processors: list[RowProcessor] | None = None
        if sampling is None:
            sampling = SamplingParams(temperature=float(do_sample))
            self._processors = [RowProcessor(row, processors, keeps) for row in rows]
        self._sampling = sampling

    def run(self, decoder: SelfSpeculativeDecoder, streamer: Any, speculation: dict[str, Any]) -> Any:
        columns = None if streamer is None else ColumnStreamer(streamer, len(self._rows), self._pad)
        out = decoder.generate(
            [row.prompt.to(decoder.model.device) for row in self._rows],
            self._max_new_tokens,
            eos_token_id=[],  # should_stop ends the rows
            sampling=[self._sampling] * len(self._rows),
            logits_processor=self._processors,
            should_stop=[self._rule(row, columns) for row in self._rows],
            pad_token_id=self._pad,
            **speculation,
        )
        if streamer is not None:
            streamer.end()
        return self._result([stats.new_tokens for stats in out.per_sequence], out.new_tokens)

    def _rule(self, row: BatchRow, columns: ColumnStreamer | None) -> Callable[[list[int]], bool]:
        scores = (lambda step: self._kept(row, step).scores) if self._keeps_scores else None

        def ends(tokens: list[int]) -> bool:
            ended = self._stopping.reached(row, tokens, scores)
            if columns is not None:
                last = ended or len(tokens) == self._max_new_tokens
                columns.add(row.index, tokens[-1], last and not self._stopping.together)
            return ended

        return ends

    def _kept(self, row: BatchRow, step: int) -> Scores:
        assert self._processors is not None
        return self._processors[row.index].kept[step]

    def _result(self, counts: list[int], new_tokens: Tensor) -> Any:
        """The sequences, as long as the longest row, with scores and logits if requested."""
        prompts = torch.stack([row.padded for row in self._rows])
        steps = self._stopping.steps(counts)
        sequences = torch.cat([prompts, new_tokens[:, :steps].to(prompts)], 1)
        if not self._config.return_dict_in_generate:
            return sequences
        keeps = self._keeps_scores or self._keeps_logits
        columns = [self._column(counts, step) for step in range(steps)] if keeps else []
        fields: dict[str, Any] = {"sequences": sequences}
        if self._keeps_scores:
            fields["scores"] = tuple(column.scores for column in columns)
        if self._keeps_logits:
            fields["logits"] = tuple(column.logits for column in columns)
        return GenerateDecoderOnlyOutput(**fields)

    def _column(self, counts: list[int], step: int) -> Scores:
        """The scores [B, V] of a step; a row that has ended has the padding token with probability 1."""
        rows = [self._kept(row, step) if step < counts[row.index] else self._padding() for row in self._rows]
        return Scores(torch.stack([row.logits for row in rows]), torch.stack([row.scores for row in rows]))

    def _padding(self) -> Scores:
        sure = torch.full_like(self._kept(self._rows[0], 0).logits, -math.inf)
        sure[self._pad] = 0
        return Scores(sure, sure)
