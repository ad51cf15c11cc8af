"""draft: the launches of partial_forward and exit_head, step after step; nothing goes to the host between."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._loops import draft_loop
from .exit_head import exit_head
from .partial_forward import partial_forward


def draft(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op, on tensors that its check has passed."""
    return draft_loop(partial_forward, exit_head, *args)
