"""speculative_round: draft, layers [E, L), exit_head and acceptance, one after the other with nothing on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._loops import round_loop
from .accept import accept_greedy
from .accept_sampled import accept_sampled
from .draft import draft
from .exit_head import exit_head
from .partial_forward import partial_forward

OPS: dict[str, Callable[..., Any]] = {
    "draft": draft,
    "partial_forward": partial_forward,
    "exit_head": exit_head,
    "accept_greedy": accept_greedy,
    "accept_sampled": accept_sampled,
}


def speculative_round(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, on tensors that its check has passed."""
    return round_loop(OPS, *args)
