"""The model class of lm-eval: ``lm_eval --model layerskip --model_args pretrained=DIR,exit_layer=4``.

The entry point ``lm_eval.models`` names it. For versions of lm-eval that do not read entry points,
``python -m layerskip.evaluation`` is the command ``lm_eval`` with the class registered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from layerskip_kernels import rms_norm
from layerskip_kernels.formats import lookup

from .. import devices, models
from .._imports import need
from ..decoding import GenerationOutput, SamplingParams, SelfSpeculativeDecoder, StopStrings
from ..decoding.detokenizer import SequenceText
from ..models import LayerSkipModel

_PURPOSE = "evaluating"
registry, lm, utils = (need(f"lm_eval.{name}", _PURPOSE) for name in ("api.registry", "api.model", "utils"))
need("lm_eval.models", _PURPOSE)  # registers lm-eval's own models, which it does only while none is registered

TASKS = Path(__file__).with_name("tasks")
"""The tasks of this package, for ``include_path`` of lm-eval."""
_DRAFT_OPTIONS = ("exit", "draft_head", "draft_source", "draft_threshold")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_NO_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "repetition_penalty": 1}
_HEAD_ROWS = 256  # rows of hidden states per call of the head


class Continuation(str):
    """The text of a request, with attributes that lm-eval's response cache keeps."""

    tokens: list[int]  # with those of a stop string
    greedy: bool
    stats: dict[str, float]  # tokens and seconds after the first token; rounds, drafted, accepted

    @classmethod
    def of(cls, text: str, output: GenerationOutput, greedy: bool) -> Continuation:
        found, stats = cls(text), output.stats
        found.tokens, found.greedy = output.new_tokens[0].tolist(), greedy
        found.stats = {
            "tokens": stats.new_tokens - 1,
            "seconds": stats.seconds - stats.time_to_first_token,
            "rounds": stats.rounds,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
        }
        return found


class GenerationOptions(NamedTuple):
    """The generation arguments of a request."""

    until: list[str]
    max_new_tokens: int
    sampling: SamplingParams

    @classmethod
    def of(cls, options: Mapping[str, Any], max_new_tokens: int) -> GenerationOptions:
        """Read lm-eval's arguments: None counts as not given, an empty stop string cuts nothing."""
        left = {name: value for name, value in options.items() if value is not None and _NO_EFFECT.get(name) != value}
        until = left.pop("until", [])
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop != ""]
        lengths = [int(left.pop(name)) for name in _LENGTHS if name in left]
        do_sample = left.pop("do_sample", None)
        values = {name: left.pop(name) for name in _SAMPLING if name in left}
        temperature = values.pop("temperature", 1.0 if do_sample else 0.0)
        if left:
            raise ValueError(f"generation arguments that layerskip does not support: {', '.join(left)}")
        sampling = SamplingParams() if do_sample is False else SamplingParams(temperature, **values)
        return cls(stops, lengths[0] if lengths else max_new_tokens, sampling)


@registry.register_model("layerskip")
class LayerSkipLM(lm.TemplateLM):  # type: ignore[name-defined]
    """A model for lm-eval: at full depth, at an early exit, or with self-speculation.

    | arguments | text | log-likelihoods |
    |---|---|---|
    | neither of these | all layers | all layers |
    | ``exit_layer`` | layers [0, E) | layers [0, E) |
    | ``num_speculations`` with ``exit_layer``, ``exit`` or ``draft_source`` | all layers verify drafts | all layers |

    Parameters
    ----------
    pretrained, dtype, weights
        As `layerskip.load` takes them; or a loaded model, with its ``tokenizer``.
    exit_layer, num_speculations
        E and K, as `SelfSpeculativeDecoder` takes them.
    device : str, optional
        "cpu", "cuda", "cuda:N" or, by default, "auto".
    batch_size : int or str
        Number of texts generated at once; "auto" is 8. Log-likelihoods are computed one text at a time.
    max_length, max_gen_toks : int
        Tokens of a context with its answer, by default the model's limit; of an answer, unless the task sets a limit.
    max_batch_size
        Ignored; lm-eval passes it.
    **draft_options
        ``exit``, ``draft_head``, ``draft_source``, ``draft_threshold``, as `SelfSpeculativeDecoder` takes them.

    Raises
    ------
    ValueError
        For draft options without ``num_speculations``, the reverse, and unknown arguments.
    """

    def __init__(
        self, pretrained: Any, exit_layer: int | str | None = None, num_speculations: int | str | None = None, *,
        tokenizer: Any = None, dtype: str = "bfloat16", weights: str | None = None, device: str | None = None,
        batch_size: int | str = 1, max_length: int | None = None, max_gen_toks: int = 256,
        max_batch_size: int | None = None, **draft_options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.strategy = _strategy(exit_layer, num_speculations, draft_options)
        if isinstance(pretrained, (str, Path)):
            pretrained, tokenizer = models.load(pretrained, getattr(torch, dtype), weights)
            pretrained = pretrained.to(devices.find(device or "auto"))
            models.gather_weights(pretrained)
        speculations = 4 if num_speculations is None else num_speculations
        self.decoder = SelfSpeculativeDecoder(pretrained, exit_layer, speculations, max_length, **draft_options)
        self.tokenizer = tokenizer
        self._batch = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length, self.max_gen_toks = self.decoder.max_seq_len, max_gen_toks

    @property
    def eot_token_id(self) -> int:
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        first: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation; without a generation prompt its last message is continued."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, by default with the tokenizer's special tokens unless the text begins with BOS."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum the log-likelihood of each continuation, and say whether greedy decoding would write it."""
        results = []
        model = self.decoder.model
        num_layers = int(self.decoder.exit_layer) if self.strategy == "early_exit" else model.num_layers
        for key, context, text in tqdm(requests, "log-likelihoods", disable=disable_tqdm or None):
            if not text or len(text) > self.max_length:
                raise ValueError(f"a continuation of {len(text)} tokens; expected 1 … max_length={self.max_length}")
            ids = torch.tensor([*context, *text][-self.max_length - 1 :], device=model.device)
            values, greedy = log_likelihoods(model, ids, num_layers, len(ids) - len(text))
            results.append((float(values.double().sum()), bool(greedy.all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows where it is longer than ``max_length``."""
        results = []
        for request in tqdm(requests, "texts", disable=disable_tqdm or None):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            results.append(sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of its stop strings."""
        texts = [""] * len(requests)
        asked = [self._prompt(*request.args) for request in requests]
        longest = max((len(prompt) + options.max_new_tokens for prompt, options in asked), default=1)
        session = self.decoder.open_session(self._batch, max_seq_len=longest, prompt_tokens_per_step=None)
        indices = {
            session.add(
                prompt, options.max_new_tokens, strategy=self.strategy, sampling=options.sampling,
                should_stop=StopStrings(self.tokenizer, options.until, prompt),
            ): index
            for index, (prompt, options) in enumerate(asked)
        }  # fmt: skip
        with tqdm(total=len(asked), desc="texts", disable=disable_tqdm or None) as progress:
            for update in session.run():
                if update.output is None:
                    continue
                index = indices[update.request_id]
                prompt, options = asked[index]
                text = SequenceText(self.tokenizer, options.until)
                text.start_after(prompt)
                pieces = [*map(text.push, update.output.new_tokens[0].tolist()), text.finish()]
                texts[index] = Continuation.of("".join(pieces), update.output, options.sampling.greedy)
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                progress.update()
        return texts

    def _prompt(self, context: str, arguments: Mapping[str, Any]) -> tuple[list[int], GenerationOptions]:
        """Tokenize a context; its beginning is cut where the answer needs the room."""
        options = GenerationOptions.of(arguments, self.max_gen_toks)
        room = self.max_length - options.max_new_tokens
        if room < 1:
            length = options.max_new_tokens
            raise ValueError(f"an answer of {length} tokens leaves no room in max_length={self.max_length}")
        return self.tok_encode(context)[-room:] or [self.prefix_token_id], options


@torch.no_grad()
def log_likelihoods(model: LayerSkipModel, ids: Tensor, num_layers: int, start: int = 1) -> tuple[Tensor, Tensor]:
    """Score tokens ``start`` … N - 1 of a text under layers [0, num_layers) with the model's norm and head.

    ln p(token) = logit(token) - log-sum-exp. `exit_head` gives the latter, so the logits are never written.

    Parameters
    ----------
    ids : Tensor [N], int64
    start : int
        At least 1: the first token of a text has no context.

    Returns
    -------
    (Tensor [N - start], fp32, Tensor [N - start], bool)
        ln p, and whether each token is the most probable one.
    """
    head, labels = model.head, ids[start:]
    cache = model.decoder.new_cache(1, len(ids) - 1)
    hidden = model.decoder.prefill(model.embed(ids[None, :-1]), cache, 0, num_layers)[0, start - 1 :]
    values, greedy = [], []
    for rows, tokens in zip(hidden.split(_HEAD_ROWS), labels.split(_HEAD_ROWS), strict=True):
        out = head(rows)
        normed = rms_norm(rows, head.norm_weight, head.eps).float()
        weights = lookup(head.head_weight, tokens, model.decoder.hidden_size, torch.float32).float()
        values.append((normed * weights).sum(-1) - out.logsumexp)
        greedy.append(out.token == tokens)
    return torch.cat(values), torch.cat(greedy)


def _strategy(exit_layer: int | str | None, num_speculations: int | str | None, draft_options: Iterable[str]) -> str:
    given = list(draft_options)
    for name in given:
        if name not in _DRAFT_OPTIONS:
            raise ValueError(f"unknown model argument {name}; expected one of {', '.join(_DRAFT_OPTIONS)}")
    if num_speculations is not None:
        if exit_layer is None and not {"exit", "draft_source"} & set(given):
            raise ValueError("num_speculations needs a draft source: give exit_layer, exit or draft_source")
        return "self_speculative"
    if given:
        raise ValueError(f"{', '.join(given)} is for drafts; give num_speculations, too")
    if exit_layer is not None and not isinstance(exit_layer, int):
        raise ValueError(f"an early exit needs a number of layers, got exit_layer={exit_layer}")
    return "autoregressive" if exit_layer is None else "early_exit"
