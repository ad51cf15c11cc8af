"""The random requests of `tools.soak`: what each asks for, and how its hooks disturb the session."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerskip import DraftSource, SamplingParams

VOCABULARY, LAYERS, LONGEST, MOST_DRAFTS = 101, 4, 64, 6


class Fault(Exception):
    """Raised in a hook: it ends the request that the hook belongs to."""


class Interrupted(BaseException):
    """Raised in a step as Ctrl-C would be: it leaves the step, and nothing may be lost."""


@dataclass(frozen=True)
class Echo(DraftSource):
    """A source of one's own: drafts the last tokens once more."""

    length: int

    def propose(self, history: Sequence[int]) -> Sequence[int]:
        """See `DraftSource.propose`."""
        return history[-self.length :]


@dataclass(frozen=True)
class Case:
    """One request. ``fault`` and ``interrupt`` are after how many new tokens a hook raises, 0: never."""

    index: int
    prompt: list[int]
    options: dict[str, Any]
    processed: bool
    stop_after: int
    fault: int
    interrupt: int

    @property
    def sampled(self) -> bool:
        """Whether its tokens are drawn."""
        return not self.options["sampling"].greedy

    def rule(self, disturbed: bool) -> Callable[[list[int]], bool]:
        """What ends it; where ``disturbed``, it raises, too: an interrupt once, a fault for ever."""
        pending = disturbed and self.interrupt > 0 and not self.processed

        def rule(tokens: list[int]) -> bool:
            nonlocal pending
            if pending and len(tokens) >= self.interrupt:
                pending = False
                raise Interrupted
            if disturbed and not self.processed and 0 < self.fault <= len(tokens):
                raise Fault(f"request {self.index}")
            return len(tokens) == self.stop_after

        return rule

    def processor(self, disturbed: bool) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Forbids a token that depends on the history, if it is ``processed``; what it raises is raised here then."""
        if not self.processed:
            return None
        pending = disturbed and self.interrupt > 0

        def processor(history: Tensor, logits: Tensor) -> Tensor:
            nonlocal pending
            made = len(history) - len(self.prompt)
            if pending and made >= self.interrupt:
                pending = False
                raise Interrupted
            if disturbed and 0 < self.fault <= made:
                raise Fault(f"request {self.index}")
            logits[int(history.sum()) % VOCABULARY] = -torch.inf
            return logits

        return processor


def case_of(seed: int, index: int) -> Case:
    """Request ``index`` of a run."""
    chance = random.Random(f"{seed}/{index}")
    length = chance.randint(1, 30)
    strategy = chance.choice(("self_speculative",) * 6 + ("autoregressive", "early_exit"))
    sampling = _sampling(chance)
    adaptive = sampling.greedy and strategy == "self_speculative"
    options = {
        "max_new_tokens": chance.randint(1, LONGEST - length if chance.random() < 0.2 else 24),
        "strategy": strategy,
        "exit_layer": "auto" if adaptive and chance.random() < 0.1 else chance.randint(1, LAYERS - 1),
        "num_speculations": "auto" if adaptive and chance.random() < 0.1 else chance.randint(1, MOST_DRAFTS),
        "draft_threshold": chance.choice((0.0, 0.0, 0.02, 0.1, 1.0)),
        "draft_source": _source(chance, adaptive) if strategy == "self_speculative" else "exit",
        "sampling": sampling,
        "eos_token_id": chance.sample(range(VOCABULARY), chance.choice((0, 0, 1, 3))),
    }

    if strategy == "self_speculative" and options["exit_layer"] != "auto" and draft_layers_of(seed):
        options["exit_layer"] = 1  # the exit's own

    def sometimes(probability: float) -> int:
        return chance.randint(1, 12) if chance.random() < probability else 0

    prompt = [chance.randrange(VOCABULARY) for _ in range(length)]
    return Case(index, prompt, options, chance.random() < 0.15, sometimes(0.2), sometimes(0.04), sometimes(0.04))


def _source(chance: random.Random, adaptive: bool) -> str | DraftSource:
    """Where drafts come from: a clock decides it for greedy requests only, whose tokens do not depend on it."""
    others: list[str | DraftSource] = ["ngram", Echo(chance.randint(1, 8)), *(["auto"] if adaptive else [])]
    return "exit" if chance.random() < 0.6 else chance.choice(others)


def _sampling(chance: random.Random) -> SamplingParams:
    penalty = chance.choice((1.0,) * 5 + (1.3,))
    if chance.random() < 0.6:
        return SamplingParams(repetition_penalty=penalty)
    cuts: dict[str, Any] = chance.choice(
        ({}, {}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.05})
    )
    seed = chance.randrange(2**40)
    return SamplingParams(chance.choice((0.7, 1.0, 1.5)), seed=seed, repetition_penalty=penalty, **cuts)


def draft_layers_of(seed: int) -> int:
    """How many draft layers the exit of a run's decoder has; with none it drafts after any layer."""
    return random.Random(f"{seed}/draft layers").choice((0, 0, 1, 2))
