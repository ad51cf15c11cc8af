"""Which options of transformers' ``generate`` are honoured, and how; all others are refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation import logits_process as processes

from ..decoding.sampling import SamplingParams

# Options of other ways to decode, with the values that turn them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1),
    "cache_implementation": (None, "dynamic", "static"),
}
_RETURNED = ("output_attentions", "output_hidden_states")
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
    """Refuse options of other ways to decode, and outputs that this one does not have.

    Raises
    ------
    ValueError
        With the option and its value.
    """
    for name, off in _OFF.items():
        value = getattr(config, name, None)
        if value not in off:
            raise ValueError(
                f"{name}={value!r} can't be honoured: layerskip.generate decodes greedily or samples, with "
                f"a cache of its own; leave it at {off[-1]!r}"
            )
    for name in _RETURNED:
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"{name}=True can't be honoured: layerskip.generate returns sequences, scores and logits")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse arguments of the model's forward, which is not called.

    Raises
    ------
    ValueError
        With the argument.
    """
    for name, value in arguments.items():
        if value is not None and name not in _HARMLESS:
            raise ValueError(f"{name} can't be honoured: layerskip.generate takes input_ids and attention_mask")


def check_cache(arguments: dict[str, Any]) -> None:
    """Refuse a cache in the arguments of ``model.generate``, unless it is empty; it stays so.

    Raises
    ------
    ValueError
        With the argument.
    """
    for name in _CACHES:
        cache = arguments.get(name)
        if cache is not None and not (hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) == 0):
            raise ValueError(f"{name} can't be honoured: layerskip.generate has a cache of its own, empty at the start")


def check_positions(position_ids: Tensor | None, mask: Tensor) -> None:
    """Refuse positions [B or 1, N] other than those of the attention mask [B, N], which count the unmasked tokens.

    Raises
    ------
    ValueError
    """
    if position_ids is None:
        return
    counted = mask.long().cumsum(1) - 1
    given = position_ids.to(mask.device).expand_as(counted)
    if bool((given[mask] != counted[mask]).any()):
        raise ValueError("position_ids can't be honoured by layerskip.generate, except those of the attention_mask")


def check_processors(processors: Sequence[Any]) -> None:
    """Refuse the logits processors that are known not to be functions of history and logits.

    Raises
    ------
    ValueError
        With the class.
    """
    for processor in processors:
        if type(processor).__name__ in _STATEFUL:
            raise ValueError(
                f"{type(processor).__name__} can't be honoured: it keeps a state from call to call, "
                "and drafts that are rejected would be in it"
            )


def treats_rows_alike(processor: Any) -> bool:
    """Whether a row's result does not depend on its place in the batch."""
    if type(processor) is processes.RepetitionPenaltyLogitsProcessor:
        return not isinstance(processor.prompt_ignore_length, Tensor)
    return type(processor) in _ROWWISE


def as_sampling(processors: Sequence[Any], do_sample: bool, padding: list[int]) -> SamplingParams | None:
    """The sampling parameters that do the same as ``processors``, or None if no parameters do.

    With parameters the processors need not be called.

    Parameters
    ----------
    processors : LogitsProcessorList
        As ``generate`` prepares it.
    do_sample : bool
    padding : list of int
        How many padding tokens are before each prompt; -1 for a prompt with padding inside.
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
    """The parameter of `SamplingParams` that does the same as this processor, or "", and its value."""
    kind = type(processor)
    if kind is processes.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        prompts = not any(padding) if ignored is None else isinstance(ignored, Tensor) and ignored.tolist() == padding
        return ("repetition_penalty" if prompts else "", processor.penalty)
    if kind is processes.TemperatureLogitsWarper:
        return "temperature", float(processor.temperature)
    # The top-k of transformers 4.57 has what it must keep in its top_k alone.
    if getattr(processor, "filter_value", None) != -math.inf or getattr(processor, "min_tokens_to_keep", 1) != 1:
        return "", None
    if kind is processes.TopKLogitsWarper:
        return "top_k", processor.top_k
    if kind is processes.TopPLogitsWarper and processor.top_p > 0:
        return "top_p", processor.top_p
    if kind is processes.MinPLogitsWarper:
        return "min_p", float(processor.min_p)
    return "", None
