"""One sequence's tokens on the device, for processors that look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class History:
    """Prompt and emitted tokens, and after them, until the next ones are emitted, a round's drafts.

    Parameters
    ----------
    prompt : Tensor [1, N], int64
    room : int
        How many tokens and drafts may follow.
    """

    def __init__(self, prompt: Tensor, room: int) -> None:
        self._tokens = torch.cat([prompt[0], prompt.new_zeros(room)])
        self._length = prompt.shape[1]

    def append(self, tokens: Sequence[int]) -> None:
        """Add emitted tokens; the drafts are gone."""
        end = self._length + len(tokens)
        self._tokens[self._length : end] = torch.tensor(tokens, dtype=torch.int64)
        self._length = end

    def put_draft(self, index: int, token: Tensor) -> None:
        """Set draft ``index`` of a round; one that was not made counts as token 0, and nothing is asked after it."""
        self._tokens[self._length + index] = token.clamp_min(0)

    def before(self, drafts: int) -> Tensor:
        """The tokens before the position that follows so many drafts, a view [n]."""
        return self._tokens[: self._length + drafts]
