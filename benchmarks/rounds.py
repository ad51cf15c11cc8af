"""Rounds that draft with a part of the head in int8, for ``python -m benchmarks.gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import layerskip_kernels as lk

from .gpu_model import EPS, Model

ACCEPTANCE, DRAFTED, DRAFT_ROWS = 0.8, 4, 32000
GOAL_US = 580  # a token of Llama-3.2-1B, E = 4


@dataclass(frozen=True)
class DraftHead:
    """A subset of a head's rows in int8, with a scale each."""

    weight: Tensor
    token_map: Tensor
    scale: Tensor

    @staticmethod
    def of(head: Tensor, rows: int) -> DraftHead:
        """The first ``rows``, rounded to 127 steps of their largest entry."""
        wide = head[:rows].float()
        scale = wide.abs().amax(1) / 127
        weight = (wide / scale[:, None]).round().to(torch.int8)
        return DraftHead(weight, torch.arange(len(weight), device=head.device), scale)


def tokens_a_round(acceptance: float, drafted: int) -> float:
    """Expected tokens where each draft holds with one probability: 1 + a + ... + a^K."""
    return sum(acceptance**i for i in range(drafted + 1))


def round_call(model: Model, drafted: int, noise: lk.Noise | None = None) -> Callable[[], lk.Round]:
    """A round of ``drafted`` drafts; the length stays, so that every replay does the same."""
    rounded = DraftHead.of(model.head, DRAFT_ROWS)
    draft_head = lk.Head(model.norm, rounded.weight, rounded.token_map, rounded.scale)
    token = torch.zeros(1, dtype=torch.int64, device=model.device)

    def call() -> lk.Round:
        cache = model.cache._replace(seq_lens=model.lengths.clone())
        return lk.speculative_round(
            token, model.head, model.weights, cache, model.shape.exit_layer, lk.Head(model.norm, model.head), drafted,
            draft_head=draft_head, eps=EPS, noise=noise,
        )  # fmt: skip

    return call


def round_cases(model: Model, time: Callable[[str, str, Callable[[], Any], str], Any]) -> Iterator[Any]:
    """Greedily and drawn, on every backend; ``time(what, backend, call, goal)`` measures."""
    expected = tokens_a_round(ACCEPTANCE, DRAFTED)
    goal = f"<= {GOAL_US * expected:.0f} us on an H100, {GOAL_US:.0f} a token" if model.shape.layers == 16 else ""
    for backend in ("cuda", "triton", "reference"):
        for how, noise in (("greedy", None), ("drawn", model.noise())):
            what = f"{model.shape.name} round, {DRAFT_ROWS} rows of int8 draft K={DRAFTED}, {how}"
            what += f", {expected:.2f} tokens at acceptance {ACCEPTANCE}"
            yield time(what, backend, round_call(model, DRAFTED, noise), goal)
