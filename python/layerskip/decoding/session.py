"""Many sequences at once, each with a prompt, an end and a speed of its own: continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .output import GenerationOutput
from .sampling import SamplingParams

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""(history [n] int64: prompt, emitted tokens and the drafts before this position; logits [V] fp32) -> logits [V]."""

StopRule = Callable[[list[int]], bool]
"""(the new tokens so far, the one in question last) -> whether the sequence ends with it."""


@dataclass(frozen=True)
class Update:
    """What one step did to one request.

    Attributes
    ----------
    request_id : int
    tokens : list of int
        New tokens; none of them is ever taken back.
    drafted : list of bool
        Whether each of them was drafted by the early layers, or given by the full model itself.
    reason : {"eos", "stop", "length", "cancelled", "error"} or None
        Why the request ended: an EOS token, its ``should_stop``, ``max_new_tokens``, `Session.cancel`, an exception;
        None while it goes on.
    output : GenerationOutput or None
        All of it [1, N + new], once it ended other than by an error. The session keeps nothing.
    error : Exception or None
        What a hook raised, or FloatingPointError for logits that are not finite. Other requests are not touched.
    """

    request_id: int
    tokens: list[int]
    drafted: list[bool]
    reason: str | None = None
    output: GenerationOutput | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last update."""
        return self.reason is not None


class Session:
    """Requests that share a cache of ``max_batch`` slots, as `SelfSpeculativeDecoder.open_session` makes it.

    A request's tokens are, bit for bit, those of decoding it alone. More requests than slots wait, first come first
    served; one that ends leaves its slot to the next.
    """

    def add(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int = 128,
        *,
        strategy: str = "self_speculative",
        exit_layer: int | str | None = None,
        num_speculations: int | str | None = None,
        draft_threshold: float = 0.0,
        sampling: SamplingParams | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: LogitsProcessor | None = None,
        should_stop: StopRule | None = None,
    ) -> int:
        """Put a request in line; its id."""
        raise NotImplementedError

    def step(self) -> list[Update]:
        """Read the prompts of waiting requests into free slots, then one round of every running one."""
        raise NotImplementedError

    def cancel(self, request_id: int) -> None:
        """End a request; the next step's update of it has the reason "cancelled" and what there is of its output."""
        raise NotImplementedError

    def remove(self, request_id: int) -> None:
        """Forget a request at once, with no update."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Requests that have not had their last update."""
        raise NotImplementedError
