"""Every combination of a few thresholds per exit at once: accuracy and cost from one joint histogram.

:func:`fastcascade.evaluation.calibration.find_thresholds` looks more closely, at one budget. This grid gives
all budgets in one pass over the instances, which makes it cheap to compare many scores or many cascades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BinnedScores", "ThresholdGrid", "resolution"]


def resolution(early_exits: int) -> int:
    """Thresholds per exit so that the grid has about 4,000 combinations."""
    return {1: 256, 2: 64, 3: 16, 4: 8}.get(early_exits, 4)


@dataclass(frozen=True)
class BinnedScores:
    """Scores of one exit against falling thresholds, from +∞ (nothing stops) to −∞ (everything stops).

    Attributes:
        thresholds: (T,) float32, falling.
        bins: (N,) the first threshold that each score reaches; choice i stops the instances with bin ≤ i.
    """

    thresholds: NDArray[np.float32]
    bins: NDArray[np.intp]

    @classmethod
    def of(cls, scores: NDArray[np.floating[Any]], size: int) -> BinnedScores:
        """At most ``size`` + 1 thresholds, evenly spaced in rank; a NaN score stops nowhere."""
        able = np.sort(scores[~np.isnan(scores)])[::-1].astype(np.float64)
        inner = np.empty(0)
        if len(able) > 1:
            at = np.unique(np.linspace(1, len(able) - 1, size - 1).round().astype(int))
            inner = np.unique((able[at] + able[at - 1]) / 2)[::-1]
        thresholds = np.concatenate([[np.inf], inner, [-np.inf]]).astype(np.float32)
        bins = np.searchsorted(-thresholds, -scores)
        return cls(thresholds, np.where(np.isnan(scores), len(thresholds), bins))


class ThresholdGrid:
    """Right answers and cost of all combinations of thresholds.

    Args:
        right: K arrays (N,) of bool: whether stopping at each exit gives the true label.
        exits: K − 1 binned scores.
        cost: (K,) accumulated cost of stopping at each exit.

    Attributes:
        hits, cost: flat, one entry per combination; sums over the instances.

    Example:
        >>> scores = BinnedScores.of(np.array([0.9, 0.1]), 2)
        >>> grid = ThresholdGrid([np.array([True, False]), np.array([True, True])], [scores], [1, 5])
        >>> [grid.thresholds(i) for i in [grid.best(6)]], grid.hits[grid.best(6)]
        ([(0.5,)], np.float64(2.0))
    """

    def __init__(
        self, right: Sequence[NDArray[np.bool_]], exits: Sequence[BinnedScores], cost: Sequence[float]
    ) -> None:
        self.exits = exits
        self.sizes = tuple(len(e.thresholds) for e in exits)
        hits, total = np.zeros(self.sizes), np.zeros(self.sizes)
        # Images that cannot stop have a bin of their own behind all others.
        sizes = tuple(size + 1 for size in self.sizes)
        inside = tuple(slice(size) for size in self.sizes)
        for k in range(len(right)):
            axes = min(k + 1, len(exits))
            flat = np.zeros(len(right[k]), np.intp)
            if axes:
                flat = np.ravel_multi_index([e.bins for e in exits[:axes]], sizes[:axes])
            for weights, table, scale in ((right[k], hits, 1.0), (None, total, float(cost[k]))):
                counts = np.bincount(flat, weights, math.prod(sizes[:axes])).reshape(sizes[:axes])
                passed = _above(counts, axes if k == len(exits) else k)
                if k < len(exits):  # of those that reach the exit, the ones with bin ≤ i stop
                    passed = passed.cumsum(k)
                passed = np.asarray(passed[inside[:axes]])
                table += scale * passed.reshape(passed.shape + (1,) * (len(exits) - axes))
        self.hits, self.cost = hits.ravel(), total.ravel()

    def best(self, budget: float) -> int | None:
        """The combination with most right answers at a total cost within the budget; of equals the cheapest.

        None if every combination costs more.
        """
        able = np.flatnonzero(self.cost <= budget * (1 + 1e-12))
        if not len(able):
            return None
        able = able[self.hits[able] == self.hits[able].max()]
        return int(able[self.cost[able].argmin()])

    def thresholds(self, combination: int) -> tuple[float, ...]:
        """The K − 1 thresholds of a combination."""
        at = np.unravel_index(combination, self.sizes) if self.sizes else ()
        return tuple(float(e.thresholds[i]) for e, i in zip(self.exits, at, strict=True))


def _above(table: NDArray[Any], axes: int) -> NDArray[Any]:
    """Sums over larger indices along the first ``axes`` axes: what passes each choice of thresholds."""
    for axis in range(axes):
        table = table.sum(axis, keepdims=True) - table.cumsum(axis)
    return table
