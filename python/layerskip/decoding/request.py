"""One request of a session: what it asks for, and what the session keeps for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .adaptive import Acceptance
from .history import History
from .processors import LogitsProcessor
from .sampling import SamplingParams
from .transcript import Transcript


@dataclass(frozen=True)
class Plan:
    """How a request is decoded; an ``exit_layer`` or a ``num_speculations`` of None is for the controller to pick."""

    strategy: str
    exit_layer: int | None
    num_speculations: int | None
    draft_threshold: float = 0.0

    @property
    def adaptive(self) -> bool:
        """Whether the controller has anything to pick."""
        return self.strategy == "self_speculative" and None in (self.exit_layer, self.num_speculations)


class Kind(NamedTuple):
    """What sequences must have in common to share a round.

    Greedy sequences may draft more than they asked for, which changes nothing about them, so ``steps`` is 0 and the
    round drafts what most of them ask for. For sequences that draw, the number of drafts decides which noise a token is
    drawn with; ``steps`` is what each of them asked for.
    """

    speculative: bool
    depth: int
    steps: int
    min_probability: float
    processed: bool


@dataclass(eq=False)
class Request:
    """A request; ``exit_layer`` and ``num_speculations`` are what its next round uses."""

    id: int
    prompt: Tensor  # [1, N]
    plan: Plan
    sampling: SamplingParams
    seed: int
    transcript: Transcript
    logits_processor: LogitsProcessor | None
    acceptance: Acceptance
    exit_layer: int
    num_speculations: int
    slot: int = -1  # while it waits
    history: History | None = None
    reported: int = 0  # how many of its tokens updates have told of

    @property
    def processed(self) -> bool:
        """Whether its tokens are chosen from processed logits; drawn drafts with a threshold are among them."""
        if self.logits_processor is not None or self.sampling.processes:
            return True
        return self.plan.draft_threshold > 0 and not self.sampling.greedy

    @property
    def wanted(self) -> int:
        """How many drafts it has a use for: a round emits its drafts and one token more."""
        return min(self.num_speculations, self.transcript.remaining - 1)

    def kind(self, num_layers: int) -> Kind:
        """What its next round has to be."""
        if self.plan.strategy != "self_speculative":
            depth = self.exit_layer if self.plan.strategy == "early_exit" else num_layers
            return Kind(False, depth, 0, 0.0, self.processed)
        steps = 0 if self.sampling.greedy else self.num_speculations
        return Kind(True, self.exit_layer, steps, self.plan.draft_threshold, self.processed)
