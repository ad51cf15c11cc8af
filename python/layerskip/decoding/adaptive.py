"""Which exit layer, and how many drafts: from measured acceptance and measured costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .costs import CostModel, Sizes

MAX_SPECULATIONS = 12
"""The most drafts that a controller picks."""

_UNKNOWN = 0.75  # what is expected of an exit that nobody has tried: enough to make it worth a try
_OWN_MEMORY, _SHARED_MEMORY = 96.0, 512.0  # trials after which a new one no longer counts less than the mean before it
_TRUST = 4.0  # trials that what other sequences had is worth to a new one
_FADE = 0.995  # of what is known of an exit, a round of another one leaves this
_EXPLORE_EVERY = 32  # rounds
_EXPLORE_DRAFTS = 3


def expected_tokens(rates: Sequence[float], most: int) -> list[float]:
    """1 + a + … + a^K, summed over ``rates``, for K = 0 … ``most``: what a round of K drafts emits.

    Each draft is accepted with probability a once those before it are.
    """
    totals = [0.0] * (most + 1)
    for rate in rates:
        tokens, power = 0.0, 1.0
        for count in range(most + 1):
            tokens += power
            power *= rate
            totals[count] += tokens
    return totals


class Rate:
    """A probability, estimated from trials; the last ``memory`` of them count.

    Parameters
    ----------
    mean, weight : float
        What is known before: as much as so many trials of this mean say.
    memory : float
    """

    def __init__(self, mean: float, weight: float, memory: float) -> None:
        self.mean, self.weight, self._memory = mean, weight, memory

    def observe(self, success: bool) -> None:
        """Take note of a trial."""
        self.weight = min(self.weight + 1, self._memory)
        self.mean += (success - self.mean) / self.weight

    def fade(self) -> None:
        """Trust the mean a little less."""
        self.weight *= _FADE

    @property
    def optimistic(self) -> float:
        """The mean and one standard error of a fair coin more."""
        return min(1.0, self.mean + 0.5 / (self.weight + 1) ** 0.5)


class Acceptance:
    """How often one sequence's drafts are accepted, by exit layer; it starts from what other sequences had.

    Parameters
    ----------
    shared : dict of int to Rate
        By exit layer; what happens here is noted there, too.
    """

    def __init__(self, shared: dict[int, Rate]) -> None:
        self._shared, self._own = shared, {}  # type: ignore[var-annotated]

    def at(self, exit_layer: int) -> Rate:
        """The rate of an exit."""
        if exit_layer not in self._own:
            shared = self._shared.setdefault(exit_layer, Rate(_UNKNOWN, 1.0, _SHARED_MEMORY))
            self._own[exit_layer] = Rate(shared.mean, min(shared.weight, _TRUST), _OWN_MEMORY)
        return self._own[exit_layer]

    def observe(self, exit_layer: int, accepted: int, drafted: int) -> None:
        """Take note of a round: so many drafts were accepted, and the one after them, where there was one, was not."""
        own, shared = self.at(exit_layer), self._shared[exit_layer]
        for success in [True] * accepted + [False] * (accepted < drafted):
            own.observe(success)
            shared.observe(success)
        for other, rate in self._own.items():
            if other != exit_layer:
                rate.fade()


class Choice(NamedTuple):
    """E and K of a round."""

    exit_layer: int
    num_speculations: int


class Controller:
    """Picks exit layer and number of drafts for sequences that share their rounds.

    It takes the (E, K) that promises the most tokens a second,

        argmax  Σ_b tokens(a_b(E), K) / seconds(E, K),    tokens(a, K) = 1 + a + … + a^K,

    with a_b(E) the measured acceptance of sequence b (`Acceptance`) and the seconds that `CostModel` learns; K = 0, to
    decode autoregressively, is among the choices. Every sequence has an acceptance of its own, but the sum is common:
    a second exit layer in a batch would be a second pass over the weights, which costs more than it can gain.

    Exploration is bounded: at most one round of 32 tries another exit than the best, with at most 3 drafts, and only
    an exit that would be better than the best one if its acceptance were a standard error above what is known. What is
    known of an exit fades while others are used, so one that became good is found again.

    What it picks depends on clocks. Greedy tokens do not depend on what it picks; sampled ones follow the same
    distribution whatever it picks, but another number of drafts takes other noise, so a seed does not repeat them.

    Parameters
    ----------
    sizes : Sizes
        Of the model, which is what costs are guessed from before they are measured.
    exits : sequence of int
        The exit layers to choose among.
    max_speculations : int
    """

    def __init__(self, sizes: Sizes, exits: Sequence[int], max_speculations: int = MAX_SPECULATIONS) -> None:
        self.exits, self.max_speculations = tuple(exits), max_speculations
        self._sizes = sizes
        self._shared: dict[int, Rate] = {}
        self._costs: dict[int, CostModel] = {}
        self._rounds = 0

    def new_acceptance(self) -> Acceptance:
        """For a new sequence."""
        return Acceptance(self._shared)

    def observe_cost(self, choice: Choice, batch: int, seconds: float) -> None:
        """Take note of what a round of ``batch`` sequences cost."""
        self._cost(batch).observe(*choice, seconds)

    def choose(
        self, acceptances: Sequence[Acceptance], exit_layer: int | None = None, num_speculations: int | None = None
    ) -> Choice:
        """E and K for the next round of some sequences; what is given is not changed."""
        exits = self.exits if exit_layer is None else (exit_layer,)
        counts = range(self.max_speculations + 1) if num_speculations is None else (num_speculations,)
        speed, best = self._best(acceptances, exits, counts)
        self._rounds += 1
        if self._rounds % _EXPLORE_EVERY:
            return best
        # A round without drafts teaches nothing, so where that is best, every exit is another one.
        others = [one for one in exits if one != best.exit_layer or best.num_speculations == 0]
        if others:
            hope, there = self._best(acceptances, others, counts, optimistic=True)
            if hope > speed:
                few = [count for count in counts if 1 <= count <= _EXPLORE_DRAFTS] or counts
                return self._best(acceptances, [there.exit_layer], few, optimistic=True)[1]
        return best

    def _best(
        self, acceptances: Sequence[Acceptance], exits: Sequence[int], counts: Sequence[int], optimistic: bool = False
    ) -> tuple[float, Choice]:
        """The most tokens a second, and where."""
        costs, best = self._cost(len(acceptances)), (0.0, Choice(exits[0], counts[0]))
        for exit_layer in exits:
            rates = [one.at(exit_layer) for one in acceptances]
            means = [rate.optimistic if optimistic else rate.mean for rate in rates]
            tokens = expected_tokens(means, counts[-1])
            for count in counts:
                speed = tokens[count] / costs.seconds(exit_layer, count)
                if speed > best[0]:
                    best = speed, Choice(exit_layer, count)
        return best

    def _cost(self, batch: int) -> CostModel:
        """One for each size of a batch, up to powers of two."""
        return self._costs.setdefault((batch - 1).bit_length(), CostModel(self._sizes))


def default_exits(num_layers: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and three quarters of the layers."""
    parts = (round(num_layers * part) for part in (0.125, 0.25, 0.5, 0.75))
    return tuple(sorted({min(max(1, part), num_layers - 1) for part in parts}))
