"""How the next token is chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import validation

_FP32 = (1e-6, 1e6)  # logits that are divided by a number in this range stay finite in fp32


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence's tokens are chosen; the default is greedy.

    The parameters change logits as transformers does, in its order: bias, repetition penalty, temperature, top-k,
    top-p, min-p. With a temperature alone no logits are written: the fused kernels draw.

    Parameters
    ----------
    temperature : float
        In [1e-6, 1e6], or 0 for greedy decoding: the token of the largest logit, after bias and penalty.
    top_k : int
        Keep the k largest; 0 keeps all.
    top_p : float
        Keep the smallest set of tokens whose probability reaches p, in (0, 1]; 1 keeps all.
    min_p : float
        Keep tokens at least ``min_p`` times as probable as the most probable one, in [0, 1]; 0 keeps all.
    repetition_penalty : float
        Divides the positive and multiplies the negative logits of tokens that occurred before, prompt included (Keskar
        et al. 2019). In [1e-6, 1e6]; 1 does nothing.
    logit_bias : mapping of int to float
        Added to the logits of single tokens: in [-1e6, 1e6], or -inf, which forbids one.
    seed : int, optional
        In 0 … 2⁶³ - 1. Seed and position determine the noise that a token is drawn with, so a sequence's samples do not
        depend on other sequences. Without a seed the call draws one from its generator.

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
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def processes(self) -> bool:
        """Whether logits have to be written and processed before a token is chosen from them."""
        truncates = not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return truncates or self.repetition_penalty != 1 or bool(self.logit_bias)


def params_of(sampling: Any, vocab_size: int) -> SamplingParams:
    """``sampling``, or greedy parameters for None; checked to have only tokens of the vocabulary."""
    if sampling is None:
        return SamplingParams()
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling must be a SamplingParams, got {type(sampling).__name__}")
    for token in sampling.logit_bias:
        if token >= vocab_size:
            raise ValueError(f"logit_bias has token id {token}, outside the vocabulary of {vocab_size}")
    return sampling


def seed_of(params: SamplingParams, generator: torch.Generator | None) -> int:
    """The seed of a sequence: the one that is given, or one that the generator, by default torch's own, draws."""
    if params.greedy:
        return 0
    if params.seed is not None:
        return params.seed
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def params_of_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    """The parameters of each prompt. A seed is counted up, or equal prompts would get equal continuations."""
    params: list[SamplingParams | None] = validation.one_each("sampling", sampling, count)
    if not isinstance(sampling, SamplingParams) or sampling.seed is None:
        return params
    return [replace(sampling, seed=(sampling.seed + index) % 2**63) for index in range(count)]
