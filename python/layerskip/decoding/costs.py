"""What a round costs: guessed from the bytes that it reads, corrected by what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..models import EarlyExitHead, LayerSkipModel

ROW_SHARE = 0.05
"""r: with weights read once for all rows, verification of 6 rows takes 1.2 to 1.3 times as long as one row."""

_MEMORY = 0.98  # of a round's weight, the next one leaves this
_OUTLIER = 2.0  # a round that took longer than so many times what was expected was interrupted
_SETTLED = 4  # rounds after which there is something to be expected
_RENEW_EVERY = 8  # rounds, of the expectations that were worked out
_TRUST = 4.0  # rounds of an (E, K) after which its own measure counts as much as the formula


@dataclass(frozen=True)
class Sizes:
    """Bytes: of a layer, of the head, of the draft head; and the number of layers."""

    layer: int
    head: int
    draft_head: int
    num_layers: int

    @classmethod
    def of(cls, model: LayerSkipModel, draft_head: EarlyExitHead) -> Sizes:
        """Those of a model's weights."""
        layer = sum(weight.nbytes for weight in model.decoder.layer_weights(0, 1))
        return cls(layer, model.head.head_weight.nbytes, draft_head.head_weight.nbytes, model.num_layers)


class CostModel:
    """Seconds of a round at exit E with K drafts.

    With l the bytes of a layer, h of the head, d of the draft head, L layers, r = `ROW_SHARE`,

        seconds(E, K) = c(E, K) · (u · K · (E·l + d)  +  v · (L·l + h + r · K · ((L - E)·l + h))).

    The first term is K drafts. The second is one pass through the whole model, of which the first E layers see the last
    draft alone and the others see K + 1 rows. u and v, in seconds a byte, are fitted to the measured rounds by least
    squares, and drawn to each other while little was measured: memory gives all bytes at one speed. c(E, K) is the mean
    ratio of measured to fitted, drawn to 1. Old rounds fade, and a round that took more than twice as long as expected
    counts as twice as long.

    Parameters
    ----------
    sizes : Sizes
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._unit = sizes.num_layers * sizes.layer + sizes.head
        self._xx = [0.0, 0.0, 0.0]  # sums of x₁², x₁x₂, x₂² of the two terms
        self._xy = [0.0, 0.0]
        self._speeds = (1.0, 1.0)  # u, v
        self._rounds = 0
        self._ratios: dict[tuple[int, int], tuple[float, float]] = {}  # mean and weight
        self._expected: dict[tuple[int, int], float] = {}

    def _terms(self, exit_layer: int, count: int) -> tuple[float, float]:
        """What u and v are multiplied with, over the bytes of the model."""
        size = self._sizes
        deep = (size.num_layers - exit_layer) * size.layer + size.head
        draft = count * (exit_layer * size.layer + size.draft_head)
        return draft / self._unit, 1 + ROW_SHARE * count * deep / self._unit

    def _fitted(self, exit_layer: int, count: int) -> float:
        first, second = self._terms(exit_layer, count)
        return self._speeds[0] * first + self._speeds[1] * second

    def seconds(self, exit_layer: int, num_speculations: int) -> float:
        """What a round is expected to take; before any was measured, in the time of a pass over the weights."""
        choice = (exit_layer, num_speculations)
        if choice not in self._expected:
            mean, weight = self._ratios.get(choice, (1.0, 0.0))
            self._expected[choice] = (mean * weight + _TRUST) / (weight + _TRUST) * self._fitted(*choice)
        return self._expected[choice]

    def observe(self, exit_layer: int, num_speculations: int, seconds: float) -> None:
        """Take note of a round."""
        if self._rounds >= _SETTLED:
            seconds = min(seconds, _OUTLIER * self.seconds(exit_layer, num_speculations))
        self._rounds += 1
        first, second = self._terms(exit_layer, num_speculations)
        new = (first * first, first * second, second * second)
        self._xx = [_MEMORY * old + term for old, term in zip(self._xx, new, strict=True)]
        self._xy = [_MEMORY * self._xy[0] + first * seconds, _MEMORY * self._xy[1] + second * seconds]
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
        weight = min(weight + 1, 1 / (1 - _MEMORY))
        self._ratios[choice] = (mean + (seconds / self._fitted(*choice) - mean) / weight, weight)
