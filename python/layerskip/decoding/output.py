"""What a call of ``generate`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Counts and times of one call.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    drafted : int
        Draft tokens that were verified.
    accepted_per_round : tuple of int
        Draft tokens that each round emitted. A round runs the deep layers once, and emits one token more than these.
    seconds : float
        Wall time of the call, prompt included.
    time_to_first_token : float
        Seconds until the prompt was read and the first token known.
    """

    prompt_tokens: int
    new_tokens: int
    drafted: int
    accepted_per_round: tuple[int, ...]
    seconds: float
    time_to_first_token: float

    @property
    def rounds(self) -> int:
        """Passes through the deep layers after the prompt."""
        return len(self.accepted_per_round)

    @property
    def accepted(self) -> int:
        """Draft tokens that were emitted."""
        return sum(self.accepted_per_round)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the wall time of the call, prompt included."""
        return self.new_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """The tokens after the first over the time after the first; 0 where there was only one."""
        after = self.seconds - self.time_to_first_token
        return (self.new_tokens - 1) / after if self.new_tokens > 1 else 0.0


@dataclass(frozen=True)
class GenerationOutput:
    """The tokens and how they came about.

    Attributes
    ----------
    sequences : Tensor [B, N + new], int64
        Prompt and new tokens.
    drafted : Tensor [B, new], bool
        Whether a new token was drafted by the early layers (and verified), or given by the full model itself.
    stats : Stats
    """

    sequences: Tensor
    drafted: Tensor
    stats: Stats

    @property
    def new_tokens(self) -> Tensor:
        """The new tokens alone, [B, new]."""
        return self.sequences[:, self.stats.prompt_tokens :]
