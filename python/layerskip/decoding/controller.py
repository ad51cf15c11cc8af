"""Picking the exit layer, the number of drafts and their source, from measured acceptance and measured costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from threading import Lock
from typing import NamedTuple

from .acceptance import AcceptanceRates, Offer, Rate, expected_tokens
from .costs import CostModel, Sizes

MAX_SPECULATIONS = 12
"""The most drafts that a controller picks."""

_EXPLORE_EVERY = 32  # rounds
_EXPLORE_SPECULATIONS = 3
_EXPLORE_SHARE = 0.01  # of the time, which all exploration may cost


class Choice(NamedTuple):
    """E and K of a round; E is 0 where the drafts were looked up, and are verified from layer 0."""

    exit_layer: int
    num_speculations: int


class Plan(NamedTuple):
    """A round: E and K, and for each sequence how many looked-up tokens it drafts, or None where the exit does."""

    choice: Choice
    looked_up: list[int | None]


class Controller:
    """Picks exit layer and number of drafts for sequences that share their rounds.

    It takes the (E, K) with the most expected tokens a second,

        argmax  Σ_b tokens(a_b(E), K) / seconds(E, K),    tokens(a, K) = 1 + a + … + a^K,

    where a_b(E) is the measured acceptance of sequence b (`AcceptanceRates`), and `CostModel` learns the seconds. K = 0
    is among the choices: autoregressive decoding. Every sequence has acceptance rates of its own, but all share the
    choice: a second exit layer in a batch would be a second pass over the weights, which costs more than it can gain.
    Where an exit has blocks, the tokens that they have to read before it drafts are part of the seconds.

    Exploration is bounded. At most one round of 32 tries another exit than the best, with at most 3 drafts, and only an
    exit that would be the best if its acceptance were a standard error above its mean. The weight of what is known of
    an exit fades while others are used, so an exit that became good is found again.

    What it picks depends on clocks. Greedy tokens do not depend on what it picks. Sampled tokens have the same
    distribution whatever it picks, but a seed does not repeat them, because another number of drafts uses other noise.

    Parameters
    ----------
    sizes : Sizes
        The model's; costs are estimated from them before they are measured.
    exits : sequence of int
        The exit layers to choose among.
    max_speculations : int
    """

    def __init__(self, sizes: Sizes, exits: Sequence[int], max_speculations: int = MAX_SPECULATIONS) -> None:
        self.exits, self.max_speculations = tuple(exits), max_speculations
        self._sizes = sizes
        self._shared: dict[Hashable, Rate] = {}
        self._spare = 0.0  # seconds that exploration may cost
        self._costs: dict[int, CostModel] = {}
        self._rounds = 0
        self._lock = Lock()  # sessions of several threads learn together

    def new_acceptance(self) -> AcceptanceRates:
        """The acceptance rates of a new sequence."""
        return AcceptanceRates(self._shared)

    def observe_cost(self, choice: Choice, batch: int, seconds: float) -> None:
        """Take account of what a round of ``batch`` sequences cost."""
        with self._lock:
            self._cost(batch).observe(*choice, seconds)

    def choose(
        self,
        acceptances: Sequence[AcceptanceRates],
        exit_layer: int | None = None,
        num_speculations: int | None = None,
    ) -> Choice:
        """E and K for the next round of some sequences; a value that is given is kept."""
        exits = self.exits if exit_layer is None else (exit_layer,)
        counts = range(self.max_speculations + 1) if num_speculations is None else (num_speculations,)
        with self._lock:
            speed, best = self._best(acceptances, exits, counts)
            return self._explored(acceptances, exits, counts, speed, best)

    def plan(
        self,
        acceptances: Sequence[AcceptanceRates],
        offers: Sequence[Offer],
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        exits: bool = True,
    ) -> Plan:
        """The next round of some sequences for each of which something was looked up, if only no tokens.

        What was looked up comes and goes, and with it the best choice; to rounds that are chosen one by one for their
        own tokens a second, a good match that is near is worth nothing. So the choice is, with the sequences' recent
        speed in tokens a second,

            argmax  tokens - speed · seconds:

        the seconds of a round are worth the tokens that the sequences emit in as many seconds on average.

        Parameters
        ----------
        acceptances, offers : sequence
            One for each sequence.
        exit_layer, num_speculations : int, optional
            What is given for the drafts of exits.
        exits : bool
            Whether an exit may draft.
        """
        layers = self.exits if exit_layer is None else (exit_layer,)
        counts = range(1, self.max_speculations + 1) if num_speculations is None else (num_speculations,)
        most = max(offer.length for offer in offers)
        with self._lock:
            pairs = list(zip(acceptances, offers, strict=True))
            promised = [one.promised(offer, most) for one, offer in pairs]
            cost, usual = self._cost(len(offers)), sum(one.speed for one in acceptances)
            tokens = map(sum, zip(*promised, strict=True))
            values = [_value(number, cost.seconds(0, count), usual) for count, number in enumerate(tokens)]
            best = Choice(0, values.index(max(values)))
            if exits:
                value, choice = self._best(acceptances, layers, counts, promised=promised, usual=usual)
                best = choice if value > max(values) else best
                best = self._explored(acceptances, layers, counts, usual, best) if usual else best
            return self._planned(best, pairs, promised)

    def _planned(
        self, choice: Choice, pairs: Sequence[tuple[AcceptanceRates, Offer]], promised: Sequence[Sequence[float]]
    ) -> Plan:
        """Who drafts what, now that E and K are known."""
        exit_layer, count = choice
        found = [_at(row, count) for row in promised]
        drafted = [expected_tokens([one.at(exit_layer).mean], count)[-1] if exit_layer else 0.0 for one, _ in pairs]
        looks_up = [other > own for own, other in zip(drafted, found, strict=True)]
        if exit_layer and all(looks_up):  # the exit is tried
            looks_up = [False] * len(pairs)
        seconds = self._cost(len(pairs)).seconds(*choice)
        for (acceptance, _), *tokens, uses in zip(pairs, drafted, found, looks_up, strict=True):
            acceptance.expect(tokens[uses], seconds)
        return Plan(
            choice, [min(one.length, count) if uses else None for (_, one), uses in zip(pairs, looks_up, strict=True)]
        )

    def _explored(
        self,
        acceptances: Sequence[AcceptanceRates],
        exits: Sequence[int],
        counts: Sequence[int],
        speed: float,
        best: Choice,
    ) -> Choice:
        """The best choice, or now and then one that is tried in its place."""
        cost = self._cost(len(acceptances))
        self._rounds += 1
        self._spare += _EXPLORE_SHARE * cost.seconds(*best)
        if self._rounds % _EXPLORE_EVERY:
            return best
        tried = self._explore(acceptances, exits, counts, speed, best)
        if tried != best:
            tokens = expected_tokens([one.at(tried.exit_layer).mean for one in acceptances], tried.num_speculations)[-1]
            loss = cost.seconds(*tried) - tokens / speed
            if loss > self._spare:
                return best
            self._spare -= max(loss, 0.0)
        return tried

    def _explore(
        self,
        acceptances: Sequence[AcceptanceRates],
        exits: Sequence[int],
        counts: Sequence[int],
        speed: float,
        best: Choice,
    ) -> Choice:
        """Another exit, with few drafts, if it may be faster than ``speed``; else the best choice."""
        # A round without drafts teaches nothing about acceptance, so after it every exit is worth a try.
        others = [one for one in exits if one != best.exit_layer or best.num_speculations == 0]
        if not others:
            return best
        possible_speed, candidate = self._best(acceptances, others, counts, optimistic=True)
        if possible_speed <= speed:
            return best
        few = [count for count in counts if 1 <= count <= _EXPLORE_SPECULATIONS] or counts
        return self._best(acceptances, [candidate.exit_layer], few, optimistic=True)[1]

    def _best(
        self,
        acceptances: Sequence[AcceptanceRates],
        exits: Sequence[int],
        counts: Sequence[int],
        optimistic: bool = False,
        promised: Sequence[Sequence[float]] = (),
        usual: float = 0.0,
    ) -> tuple[float, Choice]:
        """The most tokens a second, or beyond those of the ``usual`` speed, and the choice that gives them.

        ``promised`` are the tokens that each sequence expects of 0, 1, … looked-up drafts. Those that expect more of
        them than of the exit draft them, and run layers [0, E) in a pass of their own.
        """
        costs, best = self._cost(len(acceptances)), (-math.inf, Choice(exits[0], counts[0]))
        for exit_layer in exits:
            rates = [one.at(exit_layer) for one in acceptances]
            means = [rate.optimistic if optimistic else rate.mean for rate in rates]
            tokens = expected_tokens(means, counts[-1])
            lates = [costs.catch_up(exit_layer, one.behind) for one in acceptances]  # each in passes of its own
            late = sum(lates)
            for num_speculations in counts:
                seconds = costs.seconds(exit_layer, num_speculations) + (late if num_speculations else 0.0)
                value = _value(tokens[num_speculations], seconds, usual)
                if value > best[0]:
                    best = value, Choice(exit_layer, num_speculations)
            if len(promised) > 1:
                mixed = self._best_mixed(exit_layer, means, counts, promised, usual, lates)
                best = max(best, mixed, key=lambda one: one[0])
        return best

    def _best_mixed(
        self,
        exit_layer: int,
        rates: Sequence[float],
        counts: Sequence[int],
        promised: Sequence[Sequence[float]],
        usual: float,
        lates: Sequence[float],
    ) -> tuple[float, Choice]:
        """As `_best`, of rounds in which an exit drafts for some of the sequences, each after its own of ``lates``."""
        costs, best = self._cost(len(rates)), (-math.inf, Choice(exit_layer, counts[0]))
        drafted = [expected_tokens([rate], counts[-1]) for rate in rates]
        for count in counts:
            pairs = [(own[count], _at(row, count)) for own, row in zip(drafted, promised, strict=True)]
            if not any(own < other for own, other in pairs) or all(own < other for own, other in pairs):
                continue
            late = sum(own for own, (exit_, other) in zip(lates, pairs, strict=True) if exit_ >= other)
            seconds = costs.seconds(exit_layer, count) + costs.seconds_of_layers(exit_layer) + late
            value = _value(sum(max(pair) for pair in pairs), seconds, usual)
            if value > best[0]:
                best = value, Choice(exit_layer, count)
        return best

    def _cost(self, batch: int) -> CostModel:
        """The cost model of a batch size, rounded up to a power of two."""
        size = (batch - 1).bit_length()
        if size not in self._costs:
            self._costs[size] = CostModel(self._sizes)
        return self._costs[size]


def _value(tokens: float, seconds: float, usual: float) -> float:
    """Tokens a second, or, where a usual speed is known, the tokens beyond those that it gives in these seconds."""
    return tokens - usual * seconds if usual else tokens / seconds


def _at(promised: Sequence[float], count: int) -> float:
    """The tokens that are promised of so many drafts, or of all that there are."""
    return promised[min(count, len(promised) - 1)]


def default_exits(num_layers: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and three quarters of the layers."""
    parts = (round(num_layers * part) for part in (0.125, 0.25, 0.5, 0.75))
    return tuple(sorted({min(max(1, part), num_layers - 1) for part in parts}))
