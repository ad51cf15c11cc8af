"""One request of a session: what it asks for, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .controller import AcceptanceRates
from .logits import LogitsProcessor
from .sampling import SamplingParams
from .sequence import TokenSequence


@dataclass(frozen=True)
class Method:
    """How a request is decoded. The controller picks an ``exit_layer`` or ``num_speculations`` that is None."""

    strategy: str
    exit_layer: int | None
    num_speculations: int | None
    draft_threshold: float = 0.0

    @property
    def adaptive(self) -> bool:
        """Whether the controller has anything to pick."""
        return self.strategy == "self_speculative" and None in (self.exit_layer, self.num_speculations)


class RoundKind(NamedTuple):
    """What sequences must have in common to share a round.

    ``exit_layer`` is the layer that drafts or, without speculation, the layer whose tokens are emitted.

    Greedy sequences share rounds whatever number of drafts each asks for, because more drafts change no greedy token.
    Their ``num_speculations`` is 0 here, and the round drafts the most that any of them needs. For sequences that draw,
    the number of drafts decides which noise a token is drawn with, so here it is what each of them asks for.
    """

    speculative: bool
    exit_layer: int
    num_speculations: int
    draft_threshold: float
    processed: bool


@dataclass(eq=False)
class Request:
    """A request and its state; ``exit_layer`` and ``num_speculations`` are those of its next round."""

    id: int
    method: Method
    sampling: SamplingParams
    seed: int
    sequence: TokenSequence
    logits_processor: LogitsProcessor | None
    acceptance: AcceptanceRates
    exit_layer: int
    num_speculations: int
    slot: int = -1  # while it waits
    reported: int = 0  # how many of its tokens were in updates

    @property
    def processed(self) -> bool:
        """Whether its logits are written and processed; a threshold on drafts that are drawn needs that, too."""
        if self.logits_processor is not None or self.sampling.processes:
            return True
        return self.method.draft_threshold > 0 and not self.sampling.greedy

    @property
    def useful_drafts(self) -> int:
        """How many drafts of its next round it can emit: a round emits its drafts and one token more."""
        return min(self.num_speculations, self.sequence.remaining - 1)

    def last_layer(self, num_layers: int) -> int:
        """The number of layers that its emitted tokens come from."""
        return self.exit_layer if self.method.strategy == "early_exit" else num_layers

    def kind(self, num_layers: int) -> RoundKind:
        """The kind of its next round."""
        if self.method.strategy != "self_speculative":
            return RoundKind(False, self.last_layer(num_layers), 0, 0.0, self.processed)
        num_speculations = 0 if self.sampling.greedy else self.num_speculations
        return RoundKind(True, self.exit_layer, num_speculations, self.method.draft_threshold, self.processed)
