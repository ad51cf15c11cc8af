"""What a round costs, as it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..models import LayerSkipModel

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
