"""The model class of the package lm_eval: ``lm_eval --model layerskip --model_args pretrained=DIR,exit_layer=4``.

lm_eval finds it by an entry point. A version that looks for none is started by ``python -m layerskip.evaluation``,
which takes the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from .. import devices, models
from .._imports import need
from ..cli.ways import AUTOREGRESSIVE, EARLY_EXIT, SELF_SPECULATIVE
from ..decoding import SamplingParams, SelfSpeculativeDecoder, StopStrings
from .engine import STRATEGY, Engine, continuation, log_likelihoods

_PURPOSE = "the model class of lm_eval"
registry, lm, utils = (need(f"lm_eval.{name}", _PURPOSE) for name in ("api.registry", "api.model", "utils"))
need("lm_eval.models", _PURPOSE)  # which makes its own models known only where none is yet
_DRAFTING = ("exit", "draft_head", "draft_source", "draft_threshold")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # of an answer; the first counts
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_CHANGES_NOTHING = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "repetition_penalty": 1}


@registry.register_model("layerskip")
class LayerSkipLM(lm.TemplateLM):  # type: ignore[name-defined]
    """A model as lm_eval asks it: at full depth, at an early exit alone, or self-speculatively.

    | given | who writes texts | whose log-likelihoods |
    |---|---|---|
    | neither of these | all layers | all layers' |
    | ``exit_layer`` | the first E layers alone | the first E layers' |
    | ``num_speculations``, and what drafts | all layers, from drafts | all layers' |

    Parameters
    ----------
    pretrained : str
        As `layerskip.load` takes it: a directory, a hub name, or a name that a package provides.
    exit_layer : int, optional
        E.
    num_speculations : int or "auto", optional
        K: with it drafts are made, after E layers or by what ``drafting`` names, and all layers verify them.
    dtype : str
        Of the weights.
    weights : str, optional
        As `layerskip.load` takes it.
    device : str, optional
        "cpu", "cuda", "cuda:N" or, by default, "auto".
    batch_size : int or str
        How many texts are written at once; "auto" is 8. Log-likelihoods are computed text by text.
    max_length : int, optional
        Tokens of context and answer together; by default what the model was made for.
    max_gen_toks : int
        Tokens of an answer, where the task does not say.
    max_batch_size : int, optional
        Of no effect; lm_eval gives it.
    **drafting
        ``exit``, ``draft_head``, ``draft_source``, ``draft_threshold``: as `SelfSpeculativeDecoder` takes them.

    Raises
    ------
    ValueError
        For drafting without ``num_speculations``, ``num_speculations`` without what drafts, and unknown arguments.
    """

    def __init__(
        self, pretrained: str, exit_layer: int | None = None, num_speculations: int | str | None = None, *,
        dtype: str = "bfloat16", weights: str | None = None, device: str | None = None, batch_size: int | str = 1,
        max_length: int | None = None, max_gen_toks: int = 256, max_batch_size: int | None = None, **drafting: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._way = _way(exit_layer, num_speculations, drafting)
        model, self.tokenizer = models.load(pretrained, getattr(torch, dtype), weights)
        model = model.to(devices.find(device or "auto"))
        models.gather_weights(model)
        speculations = 4 if num_speculations is None else num_speculations
        decoder = SelfSpeculativeDecoder(model, exit_layer, speculations, max_length, **drafting)
        self._engine = Engine(decoder, self.tokenizer, exit_layer or 0)
        self._batch = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length, self.max_gen_toks = decoder.max_seq_len, max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        first: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """What caches of lm_eval tell tokenizers apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text; its last message is gone on with where no new one is to begin."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, by default with what the tokenizer puts before it, unless that is there already."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each context and continuation the sum over the latter, and whether it is what greedy decoding writes."""
        results = []
        model, depth = self._engine.decoder.model, self._engine.depth(self._way)
        for key, context, text in tqdm(requests, "log-likelihoods", disable=disable_tqdm):
            if not text or len(text) > self.max_length:
                raise ValueError(f"a continuation of {len(text)} tokens; expected 1 … max_length={self.max_length}")
            ids = torch.tensor([*context, *text][-self.max_length - 1 :], device=model.device)
            found, greedy = log_likelihoods(model, ids, depth, len(ids) - len(text))
            results.append((float(found.double().sum()), bool(greedy.all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows where it is longer than the model takes."""
        results = []
        for request in tqdm(requests, "texts", disable=disable_tqdm):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            results.append(sum(found for found, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context, up to the first of its stop strings, several at a time."""
        asked = [self._prompt(*request.args) for request in requests]
        if not asked:
            return []
        longest = max(len(prompt) + wanted.new_tokens for prompt, wanted in asked)
        session = self._engine.decoder.open_session(self._batch, max_seq_len=longest, prompt_tokens_per_step=None)
        places = {
            session.add(
                prompt, wanted.new_tokens, strategy=STRATEGY[self._way], sampling=wanted.sampling,
                should_stop=StopStrings(self.tokenizer, wanted.until, prompt),
            ): index
            for index, (prompt, wanted) in enumerate(asked)
        }  # fmt: skip
        texts = [""] * len(asked)
        with tqdm(total=len(asked), desc="texts", disable=disable_tqdm) as progress:
            for update in session.run():
                if update.output is None:
                    continue
                index = places[update.request_id]
                prompt, wanted = asked[index]
                new = update.output.new_tokens[0].tolist()
                texts[index] = continuation(self.tokenizer, prompt, new, wanted.until)
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                progress.update()
        return texts

    def _prompt(self, context: str, options: Mapping[str, Any]) -> tuple[list[int], Wanted]:
        """The end of a context that leaves room for the answer, and what is wanted."""
        wanted = Wanted(options, self.max_gen_toks)
        room = self.max_length - wanted.new_tokens
        if room < 1:
            raise ValueError(f"an answer of {wanted.new_tokens} tokens leaves no room in max_length={self.max_length}")
        return self.tok_encode(context)[-room:] or [self.prefix_token_id], wanted


class Wanted:
    """What a request for a text says: where it stops, how long it may be, how tokens are chosen.

    What is None is not given. An empty stop string cuts nothing, which is how lm_eval's own models cut texts.
    """

    def __init__(self, options: Mapping[str, Any], new_tokens: int) -> None:
        left = {name: value for name, value in options.items() if value is not None}
        left = {name: value for name, value in left.items() if _CHANGES_NOTHING.get(name) != value}
        until = left.pop("until", [])
        self.until: list[str] = [stop for stop in ([until] if isinstance(until, str) else until) if stop != ""]
        lengths = [int(left.pop(name)) for name in _LENGTHS if name in left]
        self.new_tokens = lengths[0] if lengths else new_tokens
        drawn = left.pop("do_sample", None)
        values = {name: left.pop(name) for name in _SAMPLING if name in left}
        temperature = values.pop("temperature", 1.0 if drawn else 0.0)
        self.sampling = SamplingParams() if drawn is False else SamplingParams(temperature, **values)
        if left:
            raise ValueError(f"generation arguments that layerskip does not have: {', '.join(left)}")


def _way(exit_layer: int | None, num_speculations: int | str | None, drafting: Iterable[str]) -> str:
    """How texts are written."""
    given = list(drafting)
    for name in given:
        if name not in _DRAFTING:
            raise ValueError(f"unknown model argument {name}; expected one of {', '.join(_DRAFTING)}")
    if num_speculations is not None:
        if exit_layer is None and not {"exit", "draft_source"} & set(given):
            raise ValueError("num_speculations needs what drafts: give exit_layer, exit or draft_source")
        return SELF_SPECULATIVE
    if given:
        raise ValueError(f"{', '.join(given)} is for drafts; give num_speculations, too")
    if exit_layer is not None and not isinstance(exit_layer, int):
        raise ValueError(f"an early exit is after a number of layers, got exit_layer={exit_layer}")
    return AUTOREGRESSIVE if exit_layer is None else EARLY_EXIT
