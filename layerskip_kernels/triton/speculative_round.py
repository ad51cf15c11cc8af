"""A round as the launches of its ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..speculative import compose_round
from .accept_greedy import accept_greedy
from .accept_sampled import accept_sampled
from .draft import draft
from .exit_head import exit_head
from .partial_forward import partial_forward

_OPS: dict[str, Callable[..., Any]] = {
    "draft": draft,
    "partial_forward": partial_forward,
    "exit_head": exit_head,
    "accept_greedy": accept_greedy,
    "accept_sampled": accept_sampled,
}


def speculative_round(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """No host sync between the launches."""
    return compose_round(_OPS, *args)
