"""Options of transformers' ``generate`` that are supported, and per-row views of a batch for processors.

Processors expect rows of the same length, but with self-speculation each row advances at its own speed. So they are
called for one row at a time, at each of its positions, with its whole history, padding included. A processor that does
not treat all rows alike gets a batch that has the row in every place, and only the result in the row's place is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import logits_process as processes

from ..decoding.sampling import SamplingParams

# Options of other ways to decode, with the values that turn them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "speculation_type": (None,),
    "is_assistant": (None, False),
    "guidance_scale": (None, 1),
    "cache_implementation": ("static", "dynamic", None),
}
# Options that transformers turns into processors, criteria and arguments, and those that `_Call` reads.
_OBEYED = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "token_healing",
    "watermarking_config", "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
# Options of how transformers computes, or for beams, assistants and encoders alone: no token depends on them.
_WITHOUT_EFFECT = (
    "use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile",
    "low_memory", "return_legacy_cache", "continuous_batching_config", "early_stopping", "length_penalty",
    "diversity_penalty", "decoder_start_token_id", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "max_matching_ngram_size", "transformers_version",
)  # fmt: skip
_RETURNED = ("output_attentions", "output_hidden_states")
KNOWN = frozenset((*_OFF, *_OBEYED, *_WITHOUT_EFFECT, *_RETURNED))
_CACHES = ("cache", "past_key_values")
# Arguments of a model's forward that `generate` adds itself, or that change nothing here.
_HARMLESS = ("attention_mask", "position_ids", "cache_position", "logits_to_keep", "use_cache", *_CACHES)
# These keep the tokens of their last call, and a draft that is rejected cannot be taken back.
_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
# These process a row in the same way whatever its place in the batch.
_ROWWISE = tuple(
    getattr(processes, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
        "EpsilonLogitsWarper", "EtaLogitsWarper", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
        "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor",
        "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor",
        "ExponentialDecayLengthPenalty", "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
        "LogitNormalization",
    )
)  # fmt: skip


def check_config(config: Any) -> None:
    """Raise ValueError for options of other decoding methods, outputs that are not available, and unknown options."""
    for name, unset in unknown().items():
        value = getattr(config, name, unset)
        if value is not None and value != unset:
            raise ValueError(f"{name}={value!r} can't be honoured: layerskip.generate does not know this option")
    for name, off in _OFF.items():
        value = getattr(config, name, None)
        if value not in off:
            advice = f"leave it at {off[-1]!r}"
            if name == "cache_implementation":
                advice += ", and where memory is short, generate fewer sequences at once"
            raise ValueError(
                f"{name}={value!r} can't be honoured: layerskip.generate decodes greedily or samples, with "
                f"a cache of its own on the model's device; {advice}"
            )
    for name in _RETURNED:
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"{name}=True can't be honoured: layerskip.generate returns sequences, scores and logits")


@functools.cache
def unknown() -> dict[str, Any]:
    """The options of a newer transformers, with their defaults; attributes of a user's own are not among them."""
    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    fields = {name: value for name, value in vars(GenerationConfig()).items() if not name.startswith("_")}
    return {name: defaults.get(name, value) for name, value in fields.items() if name not in KNOWN}


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ValueError for arguments of the model's forward, which is not called."""
    for name, value in arguments.items():
        if value is not None and name not in _HARMLESS:
            raise ValueError(f"{name} can't be honoured: layerskip.generate takes input_ids and attention_mask")


def check_cache(arguments: dict[str, Any]) -> None:
    """Raise ValueError for a cache in the arguments of ``model.generate``, unless it is empty."""
    for name in _CACHES:
        cache = arguments.get(name)
        if cache is not None and not (hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) == 0):
            raise ValueError(f"{name} can't be honoured: layerskip.generate has a cache of its own, empty at the start")


def check_positions(position_ids: Tensor | None, mask: Tensor) -> None:
    """Raise ValueError for positions [B or 1, N] that do not count the unmasked tokens of the mask [B, N]."""
    if position_ids is None:
        return
    counted = mask.long().cumsum(1) - 1
    given = position_ids.to(mask.device).expand_as(counted)
    if bool((given[mask] != counted[mask]).any()):
        raise ValueError("position_ids can't be honoured by layerskip.generate, except those of the attention_mask")


def check_processors(processors: Sequence[Any]) -> None:
    """Raise ValueError for logits processors that are not functions of history and logits."""
    for processor in processors:
        if type(processor).__name__ in _STATEFUL:
            raise ValueError(
                f"{type(processor).__name__} can't be honoured: it keeps a state from call to call, "
                "and drafts that are rejected would be in it"
            )


def treats_rows_alike(processor: Any) -> bool:
    if type(processor) is processes.RepetitionPenaltyLogitsProcessor:
        return not isinstance(processor.prompt_ignore_length, Tensor)
    return type(processor) in _ROWWISE


def as_sampling(processors: Sequence[Any], do_sample: bool, padding: list[int]) -> SamplingParams | None:
    """The sampling parameters that do the same as ``processors``, or None if there are none.

    ``padding`` are the numbers of padding tokens before each prompt; -1 for a prompt with padding inside.
    """
    found: dict[str, Any] = {}
    for processor in processors:
        name, value = _parameter(processor, padding)
        if name not in _ORDER[_ORDER.index(next(reversed(found))) + 1 if found else 0 :]:
            return None  # no parameter does it, or the parameters are applied in another order
        found[name] = value
    if not do_sample:
        return SamplingParams(**found) if set(found) <= {"repetition_penalty"} else None
    return SamplingParams(**{"temperature": 1.0, **found})


_ORDER = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


def _parameter(processor: Any, padding: list[int]) -> tuple[str, Any]:
    """The parameter of `SamplingParams` that does the same as a processor, or "", and its value."""
    kind = type(processor)
    if kind is processes.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        prompts = not any(padding) if ignored is None else isinstance(ignored, Tensor) and ignored.tolist() == padding
        return ("repetition_penalty" if prompts else "", processor.penalty)
    if kind is processes.TemperatureLogitsWarper:
        return "temperature", float(processor.temperature)
    # The top-k of transformers 4.57 has no min_tokens_to_keep: it is in its top_k.
    if getattr(processor, "filter_value", None) != -math.inf or getattr(processor, "min_tokens_to_keep", 1) != 1:
        return "", None
    if kind is processes.TopKLogitsWarper:
        return "top_k", processor.top_k
    if kind is processes.TopPLogitsWarper and processor.top_p > 0:
        return "top_p", processor.top_p
    if kind is processes.MinPLogitsWarper:
        return "min_p", float(processor.min_p)
    return "", None


ScoresAt = Callable[[int], Tensor]
"""(number of new tokens before a position) -> its processed scores [V]."""


class BatchRow:
    """Row ``index`` of ``batch`` rows: ``padded`` [N], a prompt with padding, where ``mask`` [N] is False.

    ``prompt`` [n] is without padding; ``padding`` counts the padding tokens before it, or is -1 if some are inside it.
    """

    def __init__(self, index: int, batch: int, padded: Tensor, mask: Tensor) -> None:
        self.index, self.batch, self.padded = index, batch, padded
        self.prompt = padded[mask]
        self.length = len(self.prompt)
        first = int(mask.int().argmax())
        self.padding = first if first + self.length == len(padded) else -1

    def over_batch(self, row: Tensor) -> Tensor:
        """Repeat ``row`` [n] in every place of the batch, [B, n]."""
        return row[None].expand(self.batch, -1)

    def history(self, tokens: Tensor) -> Tensor:
        """Add the padding to a row's tokens."""
        return torch.cat([self.padded, tokens[self.length :].to(self.padded.device)])


def rows_of(input_ids: Tensor, mask: Tensor) -> list[BatchRow]:
    """The rows of prompts [B, N] with a boolean mask [B, N]; ValueError if the last token of a row is masked."""
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    if not bool(mask[:, -1].all()):
        raise ValueError("attention_mask ends in 0: prompts of different lengths must be padded on the left")
    batch = len(input_ids)
    return [BatchRow(index, batch, input_ids[index], mask[index]) for index in range(batch)]


class Scores(NamedTuple):
    """Raw logits and processed scores: [V] of a position, or [B, V] of a step."""

    logits: Tensor
    scores: Tensor


class RowProcessor:
    """The logits processors of one row, as one function that the decoder calls.

    With ``keep``, ``kept`` has logits and scores by the number of new tokens before the position; those of a rejected
    draft are overwritten when the position is verified.
    """

    def __init__(self, row: BatchRow, processors: Sequence[Callable[..., Tensor]], keep: bool) -> None:
        self._row, self._processors, self._keep = row, processors, keep
        self.kept: dict[int, Scores] = {}

    def __call__(self, history: Tensor, logits: Tensor) -> Tensor:
        """Process logits [V] of the position after ``history`` [n]."""
        row, ids = self._row, self._row.history(history)
        logits = scores = logits.to(ids.device)
        for processor in self._processors:
            if row.batch == 1 or treats_rows_alike(processor):
                scores = processor(ids[None], scores[None].clone())[0]
            else:
                scores = processor(row.over_batch(ids).clone(), row.over_batch(scores).clone())[row.index]
        if self._keep:
            self.kept[len(history) - row.length] = Scores(logits.clone(), scores.clone())
        return scores


class BatchStopping:
    """Where the rows of a batch end, as in ``generate``.

    A row ends with the first token for which a criterion says so. But if no EOS token is among the criteria
    (``together``), a row that has ended continues until all rows have ended. ``criteria`` exclude those for length and
    EOS.
    """

    def __init__(self, criteria: Sequence[Any], eos: frozenset[int], together: bool, batch: int) -> None:
        self._criteria, self._eos = StoppingCriteriaList(criteria), eos
        self.together = together
        self._ends: list[int | None] = [None] * batch

    def reached(self, row: BatchRow, tokens: list[int], scores: ScoresAt | None = None) -> bool:
        """Whether ``row`` may stop after ``tokens``; ``scores`` returns the processed scores."""
        if self._ends[row.index] is None and self._ends_with(row, tokens, scores):
            self._ends[row.index] = len(tokens)
        ends = [end for end in self._ends if end is not None]
        if self.together:
            return len(ends) == row.batch and len(tokens) >= max(ends)
        return self._ends[row.index] is not None

    def steps(self, counts: Sequence[int]) -> int:
        """The number of new tokens of the batch, given ``counts`` of its rows."""
        ends = [end for end in self._ends if end is not None]
        return max(ends) if self.together and len(ends) == len(self._ends) else max(counts)

    def _ends_with(self, row: BatchRow, tokens: list[int], scores: ScoresAt | None) -> bool:
        if tokens[-1] in self._eos:
            return True
        if not self._criteria:
            return False
        ids = torch.cat([row.padded, torch.tensor(tokens, dtype=torch.int64, device=row.padded.device)])
        shown = None if scores is None else tuple(row.over_batch(scores(step)) for step in range(len(tokens)))
        ended = self._criteria(row.over_batch(ids).clone(), shown)
        return bool(ended[row.index])


class ColumnStreamer:
    """Pass tokens [B] of each step to a streamer when all rows have them, with ``pad`` for ended rows."""

    def __init__(self, streamer: Any, batch: int, pad: int) -> None:
        self._streamer, self._pad = streamer, pad
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        self._ended = [False] * batch
        self._given = 0

    def add(self, index: int, token: int, ended: bool) -> None:
        """Add a token to row ``index``; ``ended`` says whether it is the last one."""
        self._rows[index].append(token)
        self._ended[index] = ended
        while self._ready():
            column = [row[self._given] if self._given < len(row) else self._pad for row in self._rows]
            self._streamer.put(torch.tensor(column))
            self._given += 1

    def _ready(self) -> bool:
        known = [len(row) > self._given for row in self._rows]
        return any(known) and all(here or ended for here, ended in zip(known, self._ended, strict=True))
