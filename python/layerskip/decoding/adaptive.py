"""Choose the exit layer, the number of draft tokens and their source from measured acceptance rates and costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from ..models import LayerSkipModel

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


EXTRA_ROW_COST = 0.05
"""r: before it is measured, a further row is taken to cost this share of the first one."""

COST_MEMORY = 0.98  # each round, the weight of the rounds before it is multiplied by this
OUTLIER = 2.0  # a round that takes longer than this multiple of what was expected was interrupted
SETTLED = 4  # rounds, after which there is an expectation
RENEW_EVERY = 8  # rounds, after which the expectations are computed again
FITTED_EVERY_ROUND = 64  # so many first rounds; then the formula is fitted when the expectations are computed again
PRIOR_WEIGHT = 1.0  # the relations of u, v and w that are expected count as so much
CATCH_UP = 0.03  # what it takes, in passes, that blocks catch up, beside the bytes of the layers before them
UNTRIED_RATIO, UNTRIED_WEIGHT = 0.9, 1.0  # an untried round may cost less than the formula says: so it is tried


@dataclass(frozen=True)
class Sizes:
    """Bytes of a layer, of the head, and of what a draft reads after its layers; the numbers of layers and blocks."""

    layer: int
    head: int
    draft_head: int
    num_layers: int
    num_blocks: int = 0

    @classmethod
    def of(cls, model: LayerSkipModel) -> Sizes:
        """Those of a model's weights; blocks count as part of the draft head."""
        decoder, layers = model.decoder, model.num_layers
        layer = sum(weight.nbytes for weight in decoder.layer_weights(0, layers)) // layers
        draft_head = model.draft_head.head_weight.nbytes + sum(weight.nbytes for weight in decoder.block_weights)
        return cls(layer, model.head.head_weight.nbytes, draft_head, layers, decoder.num_blocks)


Terms = tuple[float, float, float]


class CostModel:
    """Seconds of a round at exit E with K drafts: a formula over the bytes that it reads, corrected by measurements.

    With l the bytes of a layer, h of the head, d of the draft head, L layers,

        seconds(E, K) = u · K · (E·l + d)  +  v · (L·l + h)  +  w · K · ((L - E)·l + h).

    The first term is K drafts. The second is one row through the whole model, the third the K further rows that layers
    [E, L) and the head verify. Drafts that were looked up have E = 0 and d = 0. u, v and w, in seconds a byte, are
    fitted to the measured rounds by least squares: where reading the weights takes the time a further row costs little,
    where the arithmetic does it may cost a third of the first one. While few rounds were measured, u is drawn to v,
    since memory delivers all bytes at one speed, and w to r · v. What (E, K) itself took, on average, goes before the
    formula, which counts as one measurement of it: kernels are made for some numbers of rows. Old rounds fade, and a
    round that took more than twice as long as expected counts as twice as long. Without drafts all E are one choice.

    Parameters
    ----------
    sizes : Sizes
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._model_bytes = sizes.num_layers * sizes.layer + sizes.head
        r = EXTRA_ROW_COST
        self._prior = ((1.0, -1.0, 0.0), (-1.0, 1.0 + r * r, -r), (0.0, -r, 1.0))
        self._xx = [[0.0] * 3 for _ in range(3)]
        self._xy = [0.0] * 3
        self._speeds: Terms = (1.0, 1.0, r)  # u, v, w
        self._rounds = 0
        self._means: dict[tuple[int, int], tuple[float, float]] = {}  # seconds and weight
        self._expected: dict[tuple[int, int], float] = {}

    def _terms(self, exit_layer: int, num_speculations: int) -> Terms:
        """The factors of u, v and w, divided by the bytes of the model."""
        size = self._sizes
        verified = (size.num_layers - exit_layer) * size.layer + size.head
        drafted = exit_layer * size.layer + size.draft_head if exit_layer else 0
        return num_speculations * drafted / self._model_bytes, 1.0, num_speculations * verified / self._model_bytes

    def _fitted(self, exit_layer: int, num_speculations: int) -> float:
        return sum(
            speed * term for speed, term in zip(self._speeds, self._terms(exit_layer, num_speculations), strict=True)
        )

    def seconds(self, exit_layer: int, num_speculations: int) -> float:
        """The expected seconds; before any round was measured, in units of one pass over the weights."""
        choice = (exit_layer if num_speculations else 0, num_speculations)
        expected = self._expected.get(choice)
        if expected is None:
            mean, weight = self._means.get(choice, (0.0, 0.0))
            untried = UNTRIED_RATIO * self._fitted(*choice)
            expected = (mean * weight + untried * UNTRIED_WEIGHT) / (weight + UNTRIED_WEIGHT)
            self._expected[choice] = expected
        return expected

    def seconds_of_layers(self, count: int) -> float:
        """The expected seconds of a pass through so many layers, as a part of verification."""
        return self._speeds[1] * count * self._sizes.layer / self._model_bytes

    def catch_up(self, exit_layer: int, tokens: int) -> float:
        """The expected seconds in which the blocks of an exit read so many tokens, after layers [0, exit_layer)."""
        if not (self._sizes.num_blocks and tokens):
            return 0.0
        part = exit_layer * self._sizes.layer / self._model_bytes
        return self._speeds[1] * (part + CATCH_UP) + self._speeds[2] * (tokens - 1) * part

    def observe(self, exit_layer: int, num_speculations: int, seconds: float) -> None:
        """Take account of a round."""
        if self._rounds >= SETTLED:
            seconds = min(seconds, OUTLIER * self.seconds(exit_layer, num_speculations))
        self._rounds += 1
        choice = (exit_layer if num_speculations else 0, num_speculations)
        terms = self._terms(*choice)
        self._xy = [COST_MEMORY * y + one * seconds for y, one in zip(self._xy, terms, strict=True)]
        self._xx = [
            [COST_MEMORY * x + one * other for x, other in zip(row, terms, strict=True)]
            for row, one in zip(self._xx, terms, strict=True)
        ]
        mean, weight = self._means.get(choice, (0.0, 0.0))
        weight = min(weight + 1, 1 / (1 - COST_MEMORY))
        self._means[choice] = mean + (seconds - mean) / weight, weight
        renew = self._rounds < RENEW_EVERY or self._rounds % RENEW_EVERY == 0
        if renew or self._rounds < FITTED_EVERY_ROUND:
            self._fit()
        if renew:
            self._expected.clear()
        self._expected.pop(choice, None)

    def _fit(self) -> None:
        """Least squares with a penalty on (u - v)² and (w - r·v)²; u, v ≥ a tenth of the other."""
        matrix = [
            [x + PRIOR_WEIGHT * p for x, p in zip(row, prior, strict=True)]
            for row, prior in zip(self._xx, self._prior, strict=True)
        ]
        u, v, w = _solved(matrix, self._xy)
        floor = max(u, v) / 10
        self._speeds = (max(u, floor), max(v, floor), max(w, 0.0))


def _solved(matrix: list[list[float]], values: list[float]) -> Terms:
    """The solution of three equations, whose matrix is symmetric and positive definite."""
    (a, b, c), (_, d, e), (_, _, f) = matrix
    x, y, z = values
    b1, c1 = b / a, c / a
    d, e, f, y, z = d - b * b1, e - b * c1, f - c * c1, y - x * b1, z - x * c1
    e1 = e / d
    w = (z - y * e1) / (f - e * e1)
    v = (y - e * w) / d
    return (x - b * v - c * w) / a, v, w


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
