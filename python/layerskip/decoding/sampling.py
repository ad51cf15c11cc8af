"""Sampling parameters and logits processing."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..devices import to_device
from . import validation


class TensorGroup:
    """Base of dataclasses of tensors, of other groups of them, and of values."""

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, those of other groups last."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        groups = [value for value in vars(self).values() if isinstance(value, TensorGroup)]
        return own + [tensor for group in groups for tensor in group.tensors]

    def each(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Apply ``change`` to every tensor; a group of the same type."""
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        groups = {name: value.each(change) for name, value in vars(self).items() if isinstance(value, TensorGroup)}
        return type(self)(**{**vars(self), **changed, **groups})


class History:
    """All tokens of a sequence on the device, for logits processors: prompt, new tokens, drafts of this round."""

    def __init__(self, prompt_tokens: Tensor, room: int) -> None:
        self._tokens = torch.cat([prompt_tokens[0], prompt_tokens.new_zeros(room)])
        self._length = self._num_prompt_tokens = prompt_tokens.shape[1]

    def extend(self, new_tokens: Sequence[int]) -> None:
        """Append those of all new tokens that are missing, over the drafts."""
        missing = torch.tensor(new_tokens[self._length - self._num_prompt_tokens :], dtype=torch.int64)
        self._tokens[self._length : self._length + len(missing)] = missing
        self._length += len(missing)

    def put_draft(self, index: int, token: Tensor) -> None:
        """Set draft ``index`` of this round. A missing draft is stored as token 0, and never read."""
        self._tokens[self._length + index] = token.clamp_min(0)

    def before(self, num_drafts: int) -> Tensor:
        """View [n] of all tokens up to the first ``num_drafts`` drafts."""
        return self._tokens[: self._length + num_drafts]


LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""(history [n] int64: prompt, new tokens and drafts before this position; logits [V] fp32) -> logits [V]."""

_FP32 = (1e-6, 1e6)  # logits that are divided by a number in this range stay finite in fp32


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one sequence; the default is greedy.

    Logits are processed in transformers' order: bias, repetition penalty, temperature, top-k, top-p, min-p. With a
    temperature alone the fused kernels sample, and no logits are written.

    Parameters
    ----------
    temperature : float
        In [1e-6, 1e6], or 0 for greedy decoding (bias and penalty still apply).
    top_k : int
        Keep the k largest logits; 0 keeps all.
    top_p : float
        Keep the smallest set of tokens whose total probability reaches p, in (0, 1]; 1 keeps all.
    min_p : float
        Keep tokens at least ``min_p`` times as probable as the most probable one, in [0, 1]; 0 keeps all.
    repetition_penalty : float
        Divide the positive and multiply the negative logits of all earlier tokens, prompt included (Keskar et al.
        2019). In [1e-6, 1e6]; 1 does nothing.
    logit_bias : mapping of int to float
        Added to the logits of single tokens: in [-1e6, 1e6], or -inf to forbid one.
    seed : int, optional
        In 0 … 2⁶³ - 1. Seed and position determine the noise of a token, so samples do not depend on other sequences.
        Without a seed the call draws one from its generator. A request with one drafts only if E, K or the draft source
        is given, because "auto" depends on clocks.

    Raises
    ------
    ValueError, TypeError
        With the parameter, its value and its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        if 0 < validation.real("temperature", self.temperature, 0.0, _FP32[1]) < _FP32[0]:
            raise ValueError(f"temperature must be 0 or at least {_FP32[0]:g}, got {self.temperature}")
        validation.integer_in("top_k", self.top_k, 0)
        validation.real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        validation.real("min_p", self.min_p, 0.0, 1.0)
        validation.real("repetition_penalty", self.repetition_penalty, *_FP32)
        if self.seed is not None:
            seed = validation.integer_in("seed", self.seed, 0, 2**63 - 1)
            object.__setattr__(self, "seed", seed)  # a plain int, whose sums cannot overflow
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias must map tokens to numbers, got {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            validation.integer_in("logit_bias", token, 0)
            if bias != -math.inf:
                validation.real(f"logit_bias[{token}]", bias, -_FP32[1], _FP32[1])

    @property
    def greedy(self) -> bool:
        """Whether nothing is sampled."""
        return self.temperature == 0

    @property
    def processes(self) -> bool:
        """Whether logits have to be written and processed."""
        truncates = not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return truncates or self.repetition_penalty != 1 or bool(self.logit_bias)


def params_of(sampling: Any, vocab_size: int) -> SamplingParams:
    """Check ``sampling`` against the vocabulary; None is greedy."""
    if sampling is None:
        return SamplingParams()
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling must be a SamplingParams, got {type(sampling).__name__}")
    for token in sampling.logit_bias:
        if token >= vocab_size:
            raise ValueError(f"logit_bias has token id {token}, outside the vocabulary of {vocab_size}")
    return sampling


def seed_of(params: SamplingParams, generator: torch.Generator | None) -> int:
    """Seed of a sequence: as given, or drawn from the generator."""
    if params.greedy:
        return 0
    if params.seed is not None:
        return params.seed
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def params_of_each(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[Any]:
    """Parameters of each prompt. A shared seed is incremented, so that equal prompts get different continuations."""
    if not isinstance(sampling, SamplingParams) or sampling.seed is None:
        return validation.one_each("sampling", sampling, count)
    return [replace(sampling, seed=(sampling.seed + index) % 2**63) for index in range(count)]


@dataclass(frozen=True)
class LogitsControls(TensorGroup):
    """Sampling parameters of a batch as tensors; row b belongs to sequence b, None where no sequence needs it."""

    temperature: Tensor  # [B, 1], fp32; 1 for greedy sequences
    draws: Tensor  # [B], fp32; 1 to sample, 0 for the argmax
    bias: Tensor | None  # [B, V], fp32
    penalty: Tensor | None  # [B, 1], fp32
    seen: Tensor | None  # [B, V], bool: the tokens to penalize, prompt included; a round adds what it emits
    top_k: Tensor | None  # [B, 1], int64; V keeps all
    top_p: Tensor | None  # [B, 1], fp32
    min_p: Tensor | None  # [B, 1], fp32
    largest_k: int  # upper bound of all k below V: a power of two, so that few rounds are recorded

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], before: Sequence[Tensor], vocab_size: int, device: torch.device
    ) -> LogitsControls:
        """Tensors for some sequences, of which ``before`` are all tokens so far, each [n]."""

        def numbers(values: list[float]) -> Tensor:
            return to_device(torch.tensor(values, dtype=torch.float32), device)

        def column(values: list[float], neutral: float) -> Tensor | None:
            return None if all(value == neutral for value in values) else numbers(values)[:, None]

        # Greedy sequences need no truncation: the largest logit survives it.
        top_k = [vocab_size if one.greedy else min(int(one.top_k) or vocab_size, vocab_size) for one in params]
        cuts = [k for k in top_k if k < vocab_size]
        penalty = column([one.repetition_penalty for one in params], 1.0)
        return cls(
            numbers([one.temperature or 1.0 for one in params])[:, None],
            numbers([0.0 if one.greedy else 1.0 for one in params]),
            _bias(params, vocab_size, device),
            penalty,
            None if penalty is None else torch.stack([_is_in(tokens, vocab_size) for tokens in before]),
            to_device(torch.tensor(top_k), device)[:, None] if cuts else None,
            column([1.0 if one.greedy else one.top_p for one in params], 1.0),
            column([0.0 if one.greedy else one.min_p for one in params], 0.0),
            min(1 << (max(cuts) - 1).bit_length(), vocab_size) if cuts else 0,
        )

    @property
    def form(self) -> Hashable:
        """Everything that a recorded round depends on, apart from values."""
        return *(name for name, value in vars(self).items() if value is not None), self.largest_k

    def apart(self) -> LogitsControls:
        """Copy ``seen``, so that drafts can be added to it."""
        return self if self.seen is None else replace(self, seen=self.seen.clone())

    def see(self, tokens: Tensor) -> None:
        """Add tokens [B, n]. A missing draft counts as token 0; no later position is read."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens.clamp_min(0), True)

    def put_seen(self, rows: Tensor | slice, others: LogitsControls) -> None:
        """Copy back the ``seen`` of these rows."""
        if self.seen is not None and others.seen is not None:
            self.seen[rows] = others.seen

    def penalized(self, logits: Tensor) -> Tensor:
        """Apply bias and repetition penalty to logits [B, V], fp32."""
        if self.bias is not None:
            logits = logits + self.bias
        if self.penalty is None:
            return logits
        assert self.seen is not None
        changed = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.seen, changed, logits)

    def cut(self, logits: Tensor) -> Tensor:
        """Apply temperature, top-k, top-p and min-p to logits [B, V]; dropped tokens become -inf."""
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = _keep_top_k(logits, self.top_k, self.largest_k)
        if self.top_p is not None:
            logits = _keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            floor = logits.amax(-1, keepdim=True) + self.min_p.log()
            logits = logits.masked_fill(logits < floor, -math.inf)
        return logits


class LogitsPipeline:
    """Bias, repetition penalty, a caller's own processor, temperature, top-k, top-p, min-p, in transformers' order.

    ``processors`` and ``histories`` are the requests' own, one or None for each sequence. A processor that raises is
    not called again; ``failures`` has the exceptions by sequence.
    """

    def __init__(
        self, processors: Sequence[LogitsProcessor | None] = (), histories: Sequence[History | None] = ()
    ) -> None:
        self._own = {
            sequence: (processor, history)
            for sequence, (processor, history) in enumerate(zip(processors, histories, strict=True))
            if processor is not None and history is not None
        }
        self.failures: dict[int, Exception] = {}

    def __call__(self, logits: Tensor, controls: LogitsControls, num_drafts: int, sequences: Sequence[int]) -> Tensor:
        """Process the logits [b, V], fp32, of the position that follows ``num_drafts`` draft tokens.

        ``controls`` have seen the tokens before this position. Row i belongs to sequence ``sequences[i]`` of the batch.
        A token that must not be chosen gets -inf.
        """
        logits = controls.penalized(logits)
        logits = logits.clone() if self._own else logits
        for row, processor, history in self._of(sequences):
            try:
                processed = processor(history.before(num_drafts), logits[row].clone())
                if not isinstance(processed, Tensor) or processed.shape != logits[row].shape:
                    shape = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
                    raise ValueError(f"a logits processor must give a tensor {list(logits[row].shape)}, got {shape}")
                logits[row] = processed
            except Exception as error:  # of one request: the session reports it, and the others continue
                self.failures[sequences[row]] = error
        return controls.cut(logits)

    def put_drafts(self, index: int, tokens: Tensor, sequences: Sequence[int]) -> None:
        """Add draft token ``index`` [b] of each sequence to its history."""
        for row, _, history in self._of(sequences):
            history.put_draft(index, tokens[row])

    def _of(self, sequences: Sequence[int]) -> list[tuple[int, LogitsProcessor, History]]:
        own = [(row, sequence) for row, sequence in enumerate(sequences) if sequence in self._own]
        return [(row, *self._own[sequence]) for row, sequence in own if sequence not in self.failures]


def _is_in(tokens: Tensor, vocab_size: int) -> Tensor:
    return torch.zeros(vocab_size, dtype=torch.bool, device=tokens.device).index_fill_(0, tokens, True)


def _bias(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Tensor | None:
    if not any(one.logit_bias for one in params):
        return None
    bias = torch.zeros(len(params), vocab_size, dtype=torch.float32)
    for row, one in zip(bias, params, strict=True):
        if one.logit_bias:
            row[torch.tensor(list(one.logit_bias))] = torch.tensor(list(one.logit_bias.values()), dtype=torch.float32)
    return to_device(bias, device)


def _keep_top_k(logits: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    """Drop logits below the k-th largest. A k above ``largest_k`` drops nothing."""
    ranked = logits.topk(largest_k, -1).values  # [B, largest_k]
    threshold = ranked.gather(1, (top_k - 1).clamp_max(largest_k - 1))
    return logits.masked_fill((logits < threshold) & (top_k <= largest_k), -math.inf)


def _keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Drop the least probable tokens of total probability at most 1 - p; always keep the most probable one."""
    ascending, order = logits.sort(-1)
    drop = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1].fill_(False)
    return logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -math.inf)
