"""Picking the exit layer and the number of drafts, from measured acceptance and measured costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from ..models import LayerSkipModel

MAX_SPECULATIONS = 12
"""The most drafts that a controller picks."""
EXTRA_ROW_COST = 0.05
"""r: an extra row costs this share of reading the weights; verifying 6 rows takes 1.2 to 1.3 times as long as one."""

_UNTRIED_RATE = 0.75  # the acceptance that is expected of an exit before it was tried: enough to try it
_UNTRIED_PROPOSAL = 0.5  # the same of proposals of a kind that was never seen; all of them are learned from
_OWN_MEMORY, _SHARED_MEMORY = 96.0, 512.0  # how many of the last trials a mean remembers
_NEW_SEQUENCE_WEIGHT = 4.0  # what other sequences had counts as so many trials of a new sequence
_FADE = 0.995  # each round, the weight of what is known of the exits that were not used is multiplied by this
_EXPLORE_EVERY = 32  # rounds
_EXPLORE_SPECULATIONS = 3
_RECENT = 0.95  # each round, the weight of the rounds before it in a sequence's speed is multiplied by this
_EXPLORE_SHARE = 0.01  # of the time, which all exploration may cost

_COST_MEMORY = 0.98  # each round, the weight of the rounds before it is multiplied by this
_OUTLIER = 2.0  # a round that takes longer than this multiple of what was expected was interrupted
_SETTLED = 4  # rounds, after which there is an expectation
_RENEW_EVERY = 8  # rounds, after which the expectations are computed again
_FORMULA_WEIGHT = 4.0  # in the mean of measured and fitted seconds, the formula counts as so many rounds


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
        self.weight *= _FADE

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
    """

    def __init__(self, shared: dict[Hashable, Rate]) -> None:
        self._shared = shared
        self._own: dict[Hashable, Rate] = {}
        self._recent = (0.0, 0.0)  # tokens and seconds of the last rounds, as they were expected

    def at(self, kind: Hashable) -> Rate:
        """The rate of an exit layer, or of a kind of proposals."""
        if kind not in self._own:
            untried = _UNTRIED_RATE if isinstance(kind, int) else _UNTRIED_PROPOSAL
            shared = self._shared.setdefault(kind, Rate(untried, 1.0, _SHARED_MEMORY))
            self._own[kind] = Rate(shared.mean, min(shared.weight, _NEW_SEQUENCE_WEIGHT), _OWN_MEMORY)
        return self._own[kind]

    def observe(self, exit_layer: int, accepted: int, drafted: int) -> None:
        """Take account of a round: ``accepted`` drafts were accepted, and the next one, if there was one, was not."""
        self._observe(exit_layer, [True] * accepted + [False] * (accepted < drafted))
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
        self._recent = (_RECENT * before[0] + tokens, _RECENT * before[1] + seconds)

    def observe_proposal(self, kind: Hashable, proposal: Sequence[int], emitted: Sequence[int]) -> None:
        """Take account of what was ``proposed``, drafted or not, where these tokens were emitted."""
        right = [token == other for token, other in zip(proposal, emitted, strict=False)]
        self._observe(kind, right[: right.index(False) + 1] if False in right else right)

    def _observe(self, kind: Hashable, trials: Sequence[bool]) -> None:
        own, shared = self.at(kind), self._shared[kind]
        for success in trials:
            own.observe(success)
            shared.observe(success)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a layer, of the head, and of what a draft reads after its layers; and the number of layers."""

    layer: int
    head: int
    draft_head: int
    num_layers: int

    @classmethod
    def of(cls, model: LayerSkipModel) -> Sizes:
        """Those of a model's weights; blocks count as part of the draft head."""
        layer = sum(weight.nbytes for weight in model.decoder.layer_weights(0, 1))
        draft_head = model.draft_head.head_weight.nbytes + model.decoder.num_blocks * layer
        return cls(layer, model.head.head_weight.nbytes, draft_head, model.num_layers)


class CostModel:
    """Seconds of a round at exit E with K drafts: a formula over the bytes that it reads, corrected by measurements.

    With l the bytes of a layer, h of the head, d of the draft head, L layers, r = `EXTRA_ROW_COST`,

        seconds(E, K) = c(E, K) · (u · K · (E·l + d)  +  v · (L·l + h + r · K · ((L - E)·l + h))).

    The first term is K drafts. The second is one pass through the whole model: layers [0, E) compute one row, the last
    draft, and the others K + 1 rows. Drafts that were looked up have E = 0 and d = 0. u and v, in seconds a byte, are
    fitted to the measured rounds by least squares. While few rounds were measured, u and v are drawn to each other,
    since memory delivers all bytes at one speed. c(E, K) is the mean ratio of measured to fitted seconds, drawn to 1.
    Old rounds fade, and a round that took more than twice as long as expected counts as twice as long.

    Parameters
    ----------
    sizes : Sizes
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._model_bytes = sizes.num_layers * sizes.layer + sizes.head
        self._xx = [0.0, 0.0, 0.0]  # sums of x₁², x₁x₂, x₂² of the two terms
        self._xy = [0.0, 0.0]
        self._speeds = (1.0, 1.0)  # u, v
        self._rounds = 0
        self._ratios: dict[tuple[int, int], tuple[float, float]] = {}  # mean and weight
        self._expected: dict[tuple[int, int], float] = {}

    def _terms(self, exit_layer: int, num_speculations: int) -> tuple[float, float]:
        """The factors of u and v, divided by the bytes of the model."""
        size = self._sizes
        verified = (size.num_layers - exit_layer) * size.layer + size.head
        drafted = exit_layer * size.layer + size.draft_head if exit_layer else 0
        rows = 1 + EXTRA_ROW_COST * num_speculations * verified / self._model_bytes
        return num_speculations * drafted / self._model_bytes, rows

    def _fitted(self, exit_layer: int, num_speculations: int) -> float:
        first, second = self._terms(exit_layer, num_speculations)
        return self._speeds[0] * first + self._speeds[1] * second

    def seconds(self, exit_layer: int, num_speculations: int) -> float:
        """The expected seconds; before any round was measured, in units of one pass over the weights."""
        choice = (exit_layer, num_speculations)
        if choice not in self._expected:
            mean, weight = self._ratios.get(choice, (1.0, 0.0))
            ratio = (mean * weight + _FORMULA_WEIGHT) / (weight + _FORMULA_WEIGHT)
            self._expected[choice] = ratio * self._fitted(*choice)
        return self._expected[choice]

    def seconds_of_layers(self, count: int) -> float:
        """The expected seconds of a pass through so many layers, as a part of verification."""
        return self._speeds[1] * count * self._sizes.layer / self._model_bytes

    def observe(self, exit_layer: int, num_speculations: int, seconds: float) -> None:
        """Take account of a round."""
        if self._rounds >= _SETTLED:
            seconds = min(seconds, _OUTLIER * self.seconds(exit_layer, num_speculations))
        self._rounds += 1
        first, second = self._terms(exit_layer, num_speculations)
        new = (first * first, first * second, second * second)
        self._xx = [_COST_MEMORY * old + term for old, term in zip(self._xx, new, strict=True)]
        self._xy = [_COST_MEMORY * self._xy[0] + first * seconds, _COST_MEMORY * self._xy[1] + second * seconds]
        self._fit()
        self._learn_ratio((exit_layer, num_speculations), seconds)
        if self._rounds < _RENEW_EVERY or self._rounds % _RENEW_EVERY == 0:
            self._expected.clear()

    def _fit(self) -> None:
        """Least squares with a penalty on (u - v)²; neither may be less than a tenth of the other."""
        a, b, d = self._xx[0] + 1, self._xx[1] - 1, self._xx[2] + 1
        determinant = a * d - b * b
        u = (d * self._xy[0] - b * self._xy[1]) / determinant
        v = (a * self._xy[1] - b * self._xy[0]) / determinant
        floor = max(u, v) / 10
        self._speeds = (max(u, floor), max(v, floor))

    def _learn_ratio(self, choice: tuple[int, int], seconds: float) -> None:
        mean, weight = self._ratios.get(choice, (1.0, 0.0))
        weight = min(weight + 1, 1 / (1 - _COST_MEMORY))
        self._ratios[choice] = (mean + (seconds / self._fitted(*choice) - mean) / weight, weight)


class Choice(NamedTuple):
    """E and K of a round; E is 0 where the drafts were looked up, and are verified from layer 0."""

    exit_layer: int
    num_speculations: int


class Offer(NamedTuple):
    """What was looked up for a sequence: how many tokens, and what it has in common with what proved right or not."""

    length: int
    kind: Hashable


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
            promised = [_promised(one.at(offer.kind).mean, offer.length, most) for one, offer in pairs]
            cost, usual = self._cost(len(offers)), sum(one.speed for one in acceptances)
            values = [
                _value(sum(row[count] for row in promised), cost.seconds(0, count), usual) for count in range(most + 1)
            ]
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
        drafted = [_promised(one.at(exit_layer).mean, count, count)[-1] if exit_layer else 0.0 for one, _ in pairs]
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
            for num_speculations in counts:
                value = _value(tokens[num_speculations], costs.seconds(exit_layer, num_speculations), usual)
                if value > best[0]:
                    best = value, Choice(exit_layer, num_speculations)
            if len(promised) > 1:
                best = max(best, self._best_mixed(exit_layer, means, counts, promised, usual), key=lambda one: one[0])
        return best

    def _best_mixed(
        self,
        exit_layer: int,
        rates: Sequence[float],
        counts: Sequence[int],
        promised: Sequence[Sequence[float]],
        usual: float,
    ) -> tuple[float, Choice]:
        """As `_best`, of rounds in which an exit drafts for some of the sequences."""
        costs, best = self._cost(len(rates)), (-math.inf, Choice(exit_layer, counts[0]))
        drafted = [expected_tokens([rate], counts[-1]) for rate in rates]
        for count in counts:
            pairs = [(own[count], _at(row, count)) for own, row in zip(drafted, promised, strict=True)]
            if not any(own < other for own, other in pairs) or all(own < other for own, other in pairs):
                continue
            seconds = costs.seconds(exit_layer, count) + costs.seconds_of_layers(exit_layer)
            value = _value(sum(max(pair) for pair in pairs), seconds, usual)
            if value > best[0]:
                best = value, Choice(exit_layer, count)
        return best

    def _cost(self, batch: int) -> CostModel:
        """The cost model of a batch size, rounded up to a power of two."""
        return self._costs.setdefault((batch - 1).bit_length(), CostModel(self._sizes))


def _promised(rate: float, count: int, most: int) -> list[float]:
    """The tokens that a sequence expects of a round of 0 … ``most`` drafts, of which there are ``count``."""
    tokens = expected_tokens([rate], count)
    return tokens + tokens[-1:] * (most - count)


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
