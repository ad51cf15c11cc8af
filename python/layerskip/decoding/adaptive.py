"""Choose the exit layer, the number of draft tokens and their source from measured acceptance rates and costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, repeat
from operator import mul
from threading import Lock
from typing import NamedTuple

from ..models import LayerSkipModel

UNTRIED_EXIT = 0.5  # assumed acceptance rate of an exit before the first trial: high enough to be tried
UNTRIED_PROPOSAL = 0.5  # the same of lookup drafts; every proposal is learned from, drafted or not
OWN_MEMORY, SHARED_MEMORY = 96.0, 512.0  # trials that a mean remembers
NEW_SEQUENCE_WEIGHT = 4.0  # trials that the rates of other sequences count as for a new sequence
FADE = 0.995  # weight of the rates of unused exits, per round
RECENT = 0.95  # weight of the past in a sequence's speed, per round
LONGEST_MATCH = 16  # longer matches count as this long
LATER = 2  # all tokens of a proposal from this position on share one rate


class Proposal(NamedTuple):
    """Lookup draft tokens for one sequence, and how reliable they are.

    With ``grows``, ``match`` is the length of a match, and each token counts as the first one after a longer match.
    """

    tokens: Sequence[int]
    source: str
    match: int = 0
    grows: bool = False

    def rate_key(self, position: int) -> Hashable:
        """Return the key of the acceptance rate of the token at ``position``."""
        if self.grows:
            return self.source, min(self.match + position, LONGEST_MATCH)
        return self.source, self.match, min(position, LATER)


def expected_tokens(rates: Iterable[float]) -> list[float]:
    """Tokens that a round of 0, 1, … drafts emits: 1 + a + a·b + …, with the acceptance rates a, b, … of its drafts."""
    return list(accumulate(accumulate(chain([1.0], rates), mul)))


class Rate:
    """Probability estimated from the last ``memory`` trials; the initial ``mean`` counts as ``weight`` trials."""

    def __init__(self, mean: float, weight: float, memory: float) -> None:
        self.mean, self.weight, self._memory = mean, weight, memory

    def observe(self, success: bool) -> None:
        self.weight = min(self.weight + 1, self._memory)
        self.mean += (success - self.mean) / self.weight

    def fade(self) -> None:
        self.weight *= FADE

    @property
    def optimistic(self) -> float:
        """Mean plus the standard error of a fair coin."""
        return min(1.0, self.mean + 0.5 / (self.weight + 1) ** 0.5)


class AcceptanceRates:
    """Acceptance rates of the drafts of one sequence, by exit layer and by kind of proposal.

    ``shared`` are the rates over all sequences: initial values of a new sequence, updated by its trials.
    """

    def __init__(self, shared: dict[Hashable, Rate]) -> None:
        self._shared = shared
        self._own: dict[Hashable, Rate] = {}
        self._recent = (0.0, 0.0)  # expected tokens and seconds of recent rounds
        self.lag = 0  # tokens that draft layers must read before they can draft; set before each choice

    def at(self, key: Hashable) -> Rate:
        """Return the rate of an exit layer, or of a `Proposal.rate_key`."""
        rate = self._own.get(key)
        if rate is None:
            untried = UNTRIED_EXIT if isinstance(key, int) else UNTRIED_PROPOSAL
            shared = self._shared.setdefault(key, Rate(untried, 1.0, SHARED_MEMORY))
            rate = self._own[key] = Rate(shared.mean, min(shared.weight, NEW_SEQUENCE_WEIGHT), OWN_MEMORY)
        return rate

    def observe(self, exit_layer: int, accepted: int, drafted: int) -> None:
        """Record a round of an exit: how many of its drafts were accepted."""
        for success in [True] * accepted + [False] * (accepted < drafted):
            self._observe(exit_layer, success)
        for other, rate in self._own.items():
            if other != exit_layer and isinstance(other, int):
                rate.fade()

    def observe_proposal(self, proposal: Proposal, emitted: Sequence[int]) -> None:
        """Compare a proposal, drafted or not, with the tokens that were emitted."""
        for position, (token, other) in enumerate(zip(proposal.tokens, emitted, strict=False)):
            self._observe(proposal.rate_key(position), token == other)
            if token != other:
                break

    def _observe(self, key: Hashable, success: bool) -> None:
        self.at(key).observe(success)
        self._shared[key].observe(success)

    @property
    def speed(self) -> float:
        """Expected tokens a second of recent rounds; 0 before the first one."""
        emitted, seconds = self._recent
        return emitted / seconds if seconds else 0.0

    def expect(self, emitted: float, seconds: float) -> None:
        """Record the expectation of a round that was chosen."""
        before = self._recent
        self._recent = (RECENT * before[0] + emitted, RECENT * before[1] + seconds)

    def expected_of(self, proposal: Proposal, longest: int) -> list[float]:
        """Expected tokens of a round that drafts the first 0 … ``longest`` tokens of a proposal, or all it has."""
        totals = expected_tokens(self.at(proposal.rate_key(index)).mean for index in range(len(proposal.tokens)))
        return totals + totals[-1:] * (longest - len(proposal.tokens))


EXTRA_ROW_COST = 0.05  # r: assumed cost of a further row, as a share of the first one, before it is measured
COST_MEMORY = 0.98  # weight of the past, per round
OUTLIER = 2.0  # a round that takes longer than this multiple of the expectation was interrupted
SETTLED = 4  # rounds before there is an expectation
RENEW_EVERY = 8  # rounds between updates of the expectations
FITTED_EVERY_ROUND = 64  # first rounds; afterwards the formula is fitted only when expectations are updated
PRIOR_WEIGHT = 1.0  # weight of the assumed relations of u, v and w
CATCH_UP = 0.03  # fixed cost of catching up by the draft layers, in passes
UNTRIED_RATIO, UNTRIED_WEIGHT = 0.9, 1.0  # an untried round may cost less than the formula says, so it is tried


@dataclass(frozen=True)
class Sizes:
    """Bytes of a layer, of the head, and of what a draft reads after layers [0, E); numbers of layers."""

    layer: int
    head: int
    draft_head: int
    num_layers: int
    num_draft_layers: int = 0

    @classmethod
    def of(cls, model: LayerSkipModel) -> Sizes:
        """Measure a model; draft layers count as part of the draft head."""
        decoder, layers = model.decoder, model.num_layers
        layer = sum(weight.nbytes for weight in decoder.layer_weights(0, layers)) // layers
        draft_head = model.draft_head.head_weight.nbytes + sum(weight.nbytes for weight in decoder.draft_layer_weights)
        return cls(layer, model.head.head_weight.nbytes, draft_head, layers, decoder.num_draft_layers)


class Choice(NamedTuple):
    """E and K of a round; E is None if all drafts come from lookup."""

    exit_layer: int | None
    num_speculations: int


Terms = tuple[float, float, float]


class CostModel:
    """Seconds of a round with exit layer E and K drafts: a formula over bytes, corrected by measurements.

    With l the bytes of a layer, h of the head, d of the draft head, L layers,

        seconds(E, K) = u · K · (E·l + d)  +  v · (L·l + h)  +  w · K · ((L - E)·l + h).

    The terms are K drafts, one row through the whole model, and K further rows to verify. Lookup drafts have E = 0 and
    d = 0. u, v and w, in seconds a byte, are fitted to the measured rounds by least squares, with a prior of u = v and
    w = r · v. The measured mean of (E, K) itself takes precedence; the formula counts as one measurement of it. Old
    rounds fade; a round of more than twice the expected time counts as twice. Without drafts all E are one choice.
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
        self._means: dict[tuple[int | None, int], tuple[float, float]] = {}  # seconds and weight
        self._expected: dict[tuple[int | None, int], float] = {}

    def _terms(self, exit_layer: int | None, num_speculations: int) -> Terms:
        """Factors of u, v and w, over the bytes of the model."""
        size, exit_layer = self._sizes, exit_layer or 0
        verified = (size.num_layers - exit_layer) * size.layer + size.head
        drafted = exit_layer * size.layer + size.draft_head if exit_layer else 0
        return num_speculations * drafted / self._model_bytes, 1.0, num_speculations * verified / self._model_bytes

    def seconds(self, exit_layer: int | None, num_speculations: int) -> float:
        """Expected seconds; before the first measurement in passes over the weights."""
        choice = exit_layer if num_speculations else None, num_speculations
        expected = self._expected.get(choice)
        if expected is None:
            mean, weight = self._means.get(choice, (0.0, 0.0))
            fitted = sum(speed * term for speed, term in zip(self._speeds, self._terms(*choice), strict=True))
            expected = (mean * weight + UNTRIED_RATIO * fitted * UNTRIED_WEIGHT) / (weight + UNTRIED_WEIGHT)
            self._expected[choice] = expected
        return expected

    def seconds_of_layers(self, num_layers: int) -> float:
        """Expected seconds of a verification pass through some layers."""
        return self._speeds[1] * num_layers * self._sizes.layer / self._model_bytes

    def catch_up(self, exit_layer: int, lag: int) -> float:
        """Expected seconds in which the draft layers of an exit read ``lag`` tokens, after layers [0, E)."""
        if not (self._sizes.num_draft_layers and lag):
            return 0.0
        part = exit_layer * self._sizes.layer / self._model_bytes
        return self._speeds[1] * (part + CATCH_UP) + self._speeds[2] * (lag - 1) * part

    def observe(self, exit_layer: int | None, num_speculations: int, seconds: float) -> None:
        """Record a measured round."""
        if self._rounds >= SETTLED:
            seconds = min(seconds, OUTLIER * self.seconds(exit_layer, num_speculations))
        self._rounds += 1
        choice = exit_layer if num_speculations else None, num_speculations
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
        """Least squares with a penalty on (u - v)² and (w - r·v)²; u and v at least a tenth of the other."""
        matrix = [
            [x + PRIOR_WEIGHT * p for x, p in zip(row, prior, strict=True)]
            for row, prior in zip(self._xx, self._prior, strict=True)
        ]
        u, v, w = _solve(matrix, self._xy)
        floor = max(u, v) / 10
        self._speeds = (max(u, floor), max(v, floor), max(w, 0.0))


def _solve(matrix: list[list[float]], values: list[float]) -> Terms:
    """Solve a symmetric, positive definite system of three equations."""
    (a, b, c), (_, d, e), (_, _, f) = matrix
    x, y, z = values
    b1, c1 = b / a, c / a
    d, e, f, y, z = d - b * b1, e - b * c1, f - c * c1, y - x * b1, z - x * c1
    e1 = e / d
    w = (z - y * e1) / (f - e * e1)
    v = (y - e * w) / d
    return (x - b * v - c * w) / a, v, w


MAX_SPECULATIONS = 12  # the largest K that a controller picks
_EXPLORE_EVERY = 32  # rounds
_EXPLORE_SPECULATIONS = 3
_EXPLORE_SHARE = 0.01  # of the time, at most, for exploration


class Controller:
    """Picks E and K for sequences that share their rounds, and who drafts from lookup.

    It maximizes the expected tokens a second,

        argmax  Σ_b tokens(a_b(E), K) / seconds(E, K),    tokens(a, K) = 1 + a + … + a^K,

    where a_b(E) is the measured acceptance rate of sequence b (`AcceptanceRates`), and `CostModel` learns the seconds.
    K = 0, autoregressive decoding, is among the choices. The sequences of a batch share E and K: a second exit layer
    would be a second pass over the weights. The time in which draft layers catch up counts.

    Exploration is bounded: at most one round of 32 tries another exit, with at most 3 drafts, and only one that would
    be the best with an acceptance rate one standard error above its mean. Rates of unused exits fade, so an exit that
    has improved is found again.

    The choice depends on clocks. Greedy tokens do not depend on the choice. Sampled tokens keep their distribution, but
    a seed does not repeat them, because another number of drafts uses other noise.

    Parameters
    ----------
    sizes : Sizes
        Costs are estimated from them before they are measured.
    exits : sequence of int
        Exit layers to choose from.
    max_speculations : int
    """

    def __init__(self, sizes: Sizes, exits: Sequence[int], max_speculations: int = MAX_SPECULATIONS) -> None:
        self.exits, self.max_speculations = tuple(exits), max_speculations
        self._sizes = sizes
        self._shared: dict[Hashable, Rate] = {}
        self._spare = 0.0  # seconds that exploration may cost
        self._costs: dict[int, CostModel] = {}
        self._rounds = 0
        self._lock = Lock()  # sessions of several threads share the controller

    def new_acceptance(self) -> AcceptanceRates:
        """Acceptance rates of a new sequence."""
        return AcceptanceRates(self._shared)

    def observe_cost(self, choice: Choice, batch: int, seconds: float) -> None:
        """Record the time of a round of ``batch`` sequences."""
        with self._lock:
            self._cost(batch).observe(*choice, seconds)

    def choose(
        self, acceptances: Sequence[AcceptanceRates], exit_layer: int | None = None, num_speculations: int | None = None
    ) -> Choice:
        """Choose E and K for the next round; given values are fixed."""
        exits = self.exits if exit_layer is None else (exit_layer,)
        counts = range(self.max_speculations + 1) if num_speculations is None else (num_speculations,)
        with self._lock:
            speed, best = self._best(acceptances, exits, counts)
            return self._explore(acceptances, exits, counts, speed, best)

    def choose_with_lookups(
        self,
        acceptances: Sequence[AcceptanceRates],
        proposals: Sequence[Proposal],
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        exits: bool = True,
    ) -> tuple[Choice, list[int | None]]:
        """Choose the next round of sequences that have lookup drafts, if only empty ones.

        Proposals come and go, and with them the best choice; a comparison of single rounds would ignore a good match
        that is about to come. So this maximizes, with the recent speed of the sequences in tokens a second,

            argmax  tokens - speed · seconds.

        Parameters
        ----------
        acceptances, proposals : sequence, one for each sequence
        exit_layer, num_speculations : int, optional
            Fixed values for the drafts of exits; ``exits`` is whether an exit may draft.

        Returns
        -------
        Choice
        list of int or None
            For each sequence the number of lookup drafts, or None if the exit drafts for it.
        """
        layers = self.exits if exit_layer is None else (exit_layer,)
        counts = range(1, self.max_speculations + 1) if num_speculations is None else (num_speculations,)
        longest = max(len(proposal.tokens) for proposal in proposals)
        with self._lock:
            expected = [one.expected_of(own, longest) for one, own in zip(acceptances, proposals, strict=True)]
            cost, usual = self._cost(len(proposals)), sum(one.speed for one in acceptances)
            emitted = map(sum, zip(*expected, strict=True))
            values = [_value(tokens, cost.seconds(None, count), usual) for count, tokens in enumerate(emitted)]
            best = Choice(None, values.index(max(values)))
            if exits:
                value, choice = self._best(acceptances, layers, counts, expected=expected, usual=usual)
                best = choice if value > max(values) else best
                best = self._explore(acceptances, layers, counts, usual, best) if usual else best
            return best, self._assign(best, acceptances, proposals, expected)

    def _assign(
        self,
        choice: Choice,
        acceptances: Sequence[AcceptanceRates],
        proposals: Sequence[Proposal],
        expected: Sequence[Sequence[float]],
    ) -> list[int | None]:
        """Decide for each sequence between the exit and its proposal, and record the expectation."""
        exit_layer, count = choice
        by_lookup = [_clamped(row, count) for row in expected]
        by_exit = [0.0] * len(by_lookup)
        if exit_layer is not None:
            by_exit = [expected_tokens(repeat(one.at(exit_layer).mean, count))[-1] for one in acceptances]
        uses_lookup = [other > own for own, other in zip(by_exit, by_lookup, strict=True)]
        if exit_layer is not None and all(uses_lookup):  # exploration of the exit
            uses_lookup = [False] * len(uses_lookup)
        seconds = self._cost(len(acceptances)).seconds(*choice)
        for acceptance, *emitted, uses in zip(acceptances, by_exit, by_lookup, uses_lookup, strict=True):
            acceptance.expect(emitted[uses], seconds)
        return [min(len(one.tokens), count) if uses else None for one, uses in zip(proposals, uses_lookup, strict=True)]

    def _explore(
        self,
        acceptances: Sequence[AcceptanceRates],
        exits: Sequence[int],
        counts: Sequence[int],
        speed: float,
        best: Choice,
    ) -> Choice:
        """Return the best choice, or every 32nd round another exit that may be faster than ``speed``."""
        cost = self._cost(len(acceptances))
        self._rounds += 1
        self._spare += _EXPLORE_SHARE * cost.seconds(*best)
        # A round without drafts reveals no acceptance rate, so after it every exit is worth a try.
        others = [one for one in exits if one != best.exit_layer or best.num_speculations == 0]
        if self._rounds % _EXPLORE_EVERY or not others:
            return best
        possible_speed, candidate = self._best(acceptances, others, counts, optimistic=True)
        if possible_speed <= speed or candidate.exit_layer is None:
            return best
        few = [count for count in counts if 1 <= count <= _EXPLORE_SPECULATIONS] or counts
        tried = self._best(acceptances, [candidate.exit_layer], few, optimistic=True)[1]
        if tried == best:
            return best
        rates = (repeat(one.at(candidate.exit_layer).mean, tried.num_speculations) for one in acceptances)
        loss = cost.seconds(*tried) - sum(expected_tokens(rate)[-1] for rate in rates) / speed
        if loss > self._spare:
            return best
        self._spare -= max(loss, 0.0)
        return tried

    def _best(
        self,
        acceptances: Sequence[AcceptanceRates],
        exits: Sequence[int],
        counts: Sequence[int],
        optimistic: bool = False,
        expected: Sequence[Sequence[float]] = (),
        usual: float = 0.0,
    ) -> tuple[float, Choice]:
        """Return the largest `_value` and its choice, over exits and numbers of drafts.

        ``expected`` are the tokens that each sequence expects of 0, 1, … lookup drafts. Sequences that expect more of
        them than of the exit draft them, and run layers [0, E) in a pass of their own.
        """
        costs, best, longest = self._cost(len(acceptances)), (-math.inf, Choice(exits[0], counts[0])), counts[-1]
        for exit_layer in exits:
            rates = [one.at(exit_layer) for one in acceptances]
            means = [rate.optimistic if optimistic else rate.mean for rate in rates]
            emitted = [expected_tokens(repeat(mean, longest)) for mean in means]
            totals = list(map(sum, zip(*emitted, strict=True)))
            catch_up = [costs.catch_up(exit_layer, one.lag) for one in acceptances]  # each in passes of its own
            late = sum(catch_up)
            for count in counts:
                seconds = costs.seconds(exit_layer, count)
                value = _value(totals[count], seconds + late if count else seconds, usual)
                if len(expected) > 1:
                    pairs = [(own[count], _clamped(row, count)) for own, row in zip(emitted, expected, strict=True)]
                    uses_exit = [by_exit >= by_lookup for by_exit, by_lookup in pairs]
                    if len(set(uses_exit)) == 2:
                        seconds += costs.seconds_of_layers(exit_layer) + sum(compress(catch_up, uses_exit))
                        value = max(value, _value(sum(map(max, pairs)), seconds, usual))
                if value > best[0]:
                    best = value, Choice(exit_layer, count)
        return best

    def _cost(self, batch: int) -> CostModel:
        """Cost model of a batch size, rounded up to a power of two."""
        size = (batch - 1).bit_length()
        if size not in self._costs:
            self._costs[size] = CostModel(self._sizes)
        return self._costs[size]


def _value(emitted: float, seconds: float, usual: float) -> float:
    """Tokens a second; with a ``usual`` speed, the tokens beyond those that it gives in these seconds."""
    return emitted - usual * seconds if usual else emitted / seconds


def _clamped(expected: Sequence[float], count: int) -> float:
    return expected[min(count, len(expected) - 1)]


def default_exits(num_layers: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and three quarters of the layers."""
    parts = (round(num_layers * part) for part in (0.125, 0.25, 0.5, 0.75))
    return tuple(sorted({min(max(1, part), num_layers - 1) for part in parts}))
