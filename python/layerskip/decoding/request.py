"""One request of a session: what it asks for, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..models import LayerSkipModel
from . import validation
from .acceptance import AcceptanceRates
from .controller import Controller
from .logits import LogitsProcessor
from .reading import Reading
from .sampling import SamplingParams
from .sequence import TokenSequence
from .source import AUTO, EXIT, DraftSource, Lookup, NgramSource, source_of


@dataclass(frozen=True)
class Method:
    """How a request is decoded. The controller picks an ``exit_layer`` or ``num_speculations`` that is None."""

    strategy: str
    exit_layer: int | None
    num_speculations: int | None
    draft_threshold: float = 0.0
    draft_source: str | DraftSource = EXIT

    @property
    def adaptive(self) -> bool:
        """Whether the controller has anything to pick."""
        if self.strategy != "self_speculative" or self.draft_source == AUTO:
            return self.strategy == "self_speculative"
        return self.num_speculations is None or (self.exits and self.exit_layer is None)

    @property
    def exits(self) -> bool:
        """Whether an exit may draft."""
        return self.draft_source in (EXIT, AUTO)

    def lookup(self, prompt: list[int], vocab_size: int) -> Lookup | None:
        """What looks up the drafts of a new sequence, if its source does."""
        if self.strategy != "self_speculative" or self.draft_source == EXIT:
            return None
        source = self.draft_source if isinstance(self.draft_source, DraftSource) else NgramSource()
        return Lookup(source.new(), prompt, vocab_size)

    def depth(self, model: LayerSkipModel) -> int:
        """Prompts are read with layers [0, depth): those that emitted tokens come from, and the exit's blocks."""
        if self.strategy == "early_exit" and self.exit_layer is not None:
            return self.exit_layer
        drafts = self.strategy == "self_speculative" and self.exits
        return model.num_layers + (model.decoder.num_blocks if drafts else 0)


@dataclass(frozen=True)
class Defaults:
    """How a session decodes requests that do not say otherwise.

    Attributes
    ----------
    exit_layer, num_speculations : int or "auto"
    draft_threshold : float
    eos_token_id : int, sequence of int or None
        What ends a sequence.
    controller : Controller
        What picks in the place of "auto".
    draft_source : str or DraftSource
        Where drafts come from.
    """

    exit_layer: int | str
    num_speculations: int | str
    draft_threshold: float
    eos_token_id: int | Sequence[int] | None
    controller: Controller
    draft_source: str | DraftSource = EXIT

    def method(
        self,
        strategy: str,
        exit_layer: int | str | None,
        num_speculations: int | str | None,
        draft_threshold: float | None,
        draft_source: str | DraftSource | None,
        model: LayerSkipModel,
        max_speculations: int,
    ) -> Method:
        """What a request asks for, checked, with these defaults in the place of None."""
        exit_layer = self.exit_layer if exit_layer is None else exit_layer
        num_speculations = self.num_speculations if num_speculations is None else num_speculations
        draft_threshold = self.draft_threshold if draft_threshold is None else draft_threshold
        method = Method(
            validation.strategy(strategy),
            validation.exit_layer_or_auto(exit_layer, model.num_layers),
            validation.num_speculations_or_auto(num_speculations, max_speculations),
            validation.real("draft_threshold", draft_threshold, 0.0, 1.0),
            source_of(self.draft_source if draft_source is None else draft_source),
        )
        if strategy == "early_exit" and method.exit_layer is None:
            raise ValueError(f"exit_layer must be an int for the strategy early_exit, got {exit_layer!r}")
        if strategy == "self_speculative" and method.exits and model.exit_layer is not None:
            validation.exit_layer_of_exit(method.exit_layer, model.exit_layer)
        return method if strategy == "self_speculative" and method.exits else replace(method, draft_threshold=0.0)


class RoundKind(NamedTuple):
    """What sequences must have in common to share a round.

    ``exit_layer`` is the layer that drafts or, without speculation, the layer whose tokens are emitted. It is 0 where
    all drafts are looked up; such sequences may join any round in which others speculate.

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
    """A request and its state; ``exit_layer`` and ``num_speculations`` are those of its next round.

    ``tokens`` are its prompt's. It may ``keep`` its row of the cache when it ends, and continues the one of the request
    ``continues``. ``reported`` of its tokens were in updates. ``looked_up`` are the drafts of its next round, or None
    where an exit makes them. An exit's blocks have read the tokens before ``blocks_done``.
    """

    id: int
    method: Method
    sampling: SamplingParams
    seed: int
    sequence: TokenSequence
    reading: Reading
    logits_processor: LogitsProcessor | None
    acceptance: AcceptanceRates
    keep: bool = False
    continues: int | None = None
    reported: int = 0
    lookup: Lookup | None = None
    looked_up: list[int] | None = None
    exit_layer: int = field(init=False)
    num_speculations: int = field(init=False)
    tokens: list[int] = field(init=False)
    blocks_done: int = field(init=False)

    def __post_init__(self) -> None:
        self.exit_layer, self.num_speculations = self.method.exit_layer or 0, self.method.num_speculations or 0
        self.tokens = self.sequence.prompt[0].tolist()
        self.blocks_done = len(self.tokens)

    @property
    def all_tokens(self) -> list[int]:
        """Its prompt's, and the new ones."""
        return self.tokens + self.sequence.tokens

    @property
    def behind(self) -> int:
        """How many tokens an exit's blocks have to read before it drafts again."""
        return max(0, self.sequence.position - self.blocks_done)

    @property
    def slot(self) -> int:
        """Its row of the cache; -1 while it waits."""
        return self.reading.slot

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

    @property
    def source(self) -> str:
        """What drafts its next round."""
        return EXIT if self.lookup is None or self.looked_up is None else self.lookup.name

    def look_up(self, most: int) -> None:
        """Ask its source for drafts of its next round, at most so many."""
        if self.lookup is not None:
            self.lookup.propose(self.sequence.tokens, min(most, self.sequence.remaining - 1))
            self.looked_up = self.lookup.proposal

    def kind(self) -> RoundKind:
        """The kind of its next round."""
        if self.method.strategy != "self_speculative":
            return RoundKind(False, self.reading.depth, 0, 0.0, self.processed)
        if not self.method.exits:
            return RoundKind(True, 0, 0, 0.0, self.processed)
        num_speculations = 0 if self.sampling.greedy else self.num_speculations
        return RoundKind(True, self.exit_layer, num_speculations, self.method.draft_threshold, self.processed)

    def fault(self, token: int, what: str, layer: int, position: int) -> str | None:
        """The message for a token of -1, by which a head says that its logits are not finite; else None."""
        if token != -1:
            return None
        causes = "the weights or the states hold NaN or infinity"
        if self.processed:
            causes += ", or bias and processors forbid every token"
        return f"{what} after layer {layer} gave logits that are not finite at position {position}; {causes}"
