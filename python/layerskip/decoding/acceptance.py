"""How often drafts are accepted, of each source, as it is measured."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

UNTRIED_EXIT = 0.5  # the acceptance that is expected of an exit before it was tried: enough to try it
UNTRIED_PROPOSAL = 0.5  # the same of looked-up tokens of a kind that was never seen; all of them are learned from
OWN_MEMORY, SHARED_MEMORY = 96.0, 512.0  # how many of the last trials a mean remembers
NEW_SEQUENCE_WEIGHT = 4.0  # what other sequences had counts as so many trials of a new sequence
FADE = 0.995  # each round, the weight of what is known of the exits that were not used is multiplied by this
RECENT = 0.95  # each round, the weight of the rounds before it in a sequence's speed is multiplied by this
LONGEST_MATCH = 16  # longer ones count as so long
LATER = 2  # tokens of a proposal from this one on count as alike


class Kind(NamedTuple):
    """What a proposal has in common with others: its source, and how sure it is.

    Where the match ``grows``, a token whose predecessors were right is as sure as the first one of a match that is so
    much longer: it continues the same text.
    """

    source: str
    match: int
    grows: bool = False

    def of(self, position: int) -> Hashable:
        """That of one token, which has its own rate."""
        if self.grows:
            return self.source, min(self.match + position, LONGEST_MATCH)
        return self.source, self.match, min(position, LATER)


class Offer(NamedTuple):
    """What was looked up for a sequence: how many tokens, and of which kind."""

    length: int
    kind: Kind


def expected_tokens(rates: Sequence[float], most: int) -> list[float]:
    """Tokens that a round of K drafts emits, for K = 0 … ``most``: 1 + a + … + a^K, summed over the ``rates`` a.

    a is the probability that a draft is accepted if those before it were.
    """
    totals = [0.0] * (most + 1)
    for rate in rates:
        tokens, power = 0.0, 1.0
        for num_speculations in range(most + 1):
            tokens += power
            power *= rate
            totals[num_speculations] += tokens
    return totals


class Rate:
    """A probability, estimated from its last ``memory`` trials.

    Parameters
    ----------
    mean, weight : float
        The estimate before the first trial, and how many trials it counts as.
    memory : float
    """

    def __init__(self, mean: float, weight: float, memory: float) -> None:
        self.mean, self.weight, self._memory = mean, weight, memory

    def observe(self, success: bool) -> None:
        """Take account of a trial."""
        self.weight = min(self.weight + 1, self._memory)
        self.mean += (success - self.mean) / self.weight

    def fade(self) -> None:
        """Trust the mean a little less."""
        self.weight *= FADE

    @property
    def optimistic(self) -> float:
        """The mean plus the standard error that a fair coin would have."""
        return min(1.0, self.mean + 0.5 / (self.weight + 1) ** 0.5)


class AcceptanceRates:
    """How often the drafts of one sequence are accepted, by exit layer, and by the kind of what was looked up.

    Parameters
    ----------
    shared : dict of int or other key to Rate
        The rates of all sequences: a new sequence starts from them, and its trials count in them, too.

    Attributes
    ----------
    behind : int
        How many tokens an exit's blocks have to read before it drafts again. Who knows sets it before each choice.
    """

    def __init__(self, shared: dict[Hashable, Rate]) -> None:
        self._shared = shared
        self._own: dict[Hashable, Rate] = {}
        self._recent = (0.0, 0.0)  # tokens and seconds of the last rounds, as they were expected
        self.behind = 0

    def at(self, kind: Hashable) -> Rate:
        """The rate of an exit layer, or of tokens of a kind."""
        rate = self._own.get(kind)
        if rate is None:
            untried = UNTRIED_EXIT if isinstance(kind, int) else UNTRIED_PROPOSAL
            shared = self._shared.setdefault(kind, Rate(untried, 1.0, SHARED_MEMORY))
            rate = self._own[kind] = Rate(shared.mean, min(shared.weight, NEW_SEQUENCE_WEIGHT), OWN_MEMORY)
        return rate

    def observe(self, exit_layer: int, accepted: int, drafted: int) -> None:
        """Take account of a round: ``accepted`` drafts were accepted, and the next one, if there was one, was not."""
        for success in [True] * accepted + [False] * (accepted < drafted):
            self._observe(exit_layer, success)
        for other, rate in self._own.items():
            if other != exit_layer and isinstance(other, int):
                rate.fade()

    @property
    def speed(self) -> float:
        """The tokens a second that were expected of the last rounds; 0 before the first one."""
        tokens, seconds = self._recent
        return tokens / seconds if seconds else 0.0

    def expect(self, tokens: float, seconds: float) -> None:
        """Take account of a round that was chosen."""
        before = self._recent
        self._recent = (RECENT * before[0] + tokens, RECENT * before[1] + seconds)

    def promised(self, offer: Offer, most: int) -> list[float]:
        """The tokens that are expected of a round that drafts 0 … ``most`` tokens of an offer, or all that it has."""
        total = reached = 1.0
        tokens = [total]
        for position in range(offer.length):
            reached *= self.at(offer.kind.of(position)).mean
            total += reached
            tokens.append(total)
        return tokens + [total] * (most - offer.length)

    def observe_proposal(self, kind: Kind, proposal: Sequence[int], emitted: Sequence[int]) -> None:
        """Take account of what was proposed, drafted or not, where these tokens were emitted."""
        for position, (token, other) in enumerate(zip(proposal, emitted, strict=False)):
            self._observe(kind.of(position), token == other)
            if token != other:
                break

    def _observe(self, kind: Hashable, success: bool) -> None:
        self.at(kind).observe(success)
        self._shared[kind].observe(success)
