"""Operating points from held-out data: thresholds for a budget, an accuracy floor, or a bound on the risk.

The stages and the selector stay as they are; only the K−1 stop thresholds are chosen, jointly, so one trained
cascade serves any trade-off at test time. docs/operating-points.md explains the choices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcascade.data.batches import Data
from fastcascade.engine import CompiledCascade
from fastcascade.errors import CalibrationError, CostWarning, InvalidArgument
from fastcascade.evaluation.evaluation import Trace, trace
from fastcascade.evaluation.risk import certify, risk_path
from fastcascade.model.cascade import Cascade
from fastcascade.types import OperatingPoint

__all__ = ["calibrate", "find_thresholds", "find_thresholds_by_time", "measure_point"]

COMBINATIONS = 1024
"""Combinations of all thresholds but the last tried per round of the search."""

CHOICES = 257
"""Thresholds considered per stage, evenly spaced in rank. More would only follow the noise of the sample."""

_NS_PER_MS = 1_000_000

SMALLEST_GAP = 1e-5
"""Relative distance of two neighbouring scores below which no threshold is put between them: two backends
may round such scores to different sides."""


def calibrate(
    cascade: Cascade | CompiledCascade,
    held_out: Data | Trace,
    name: str = "default",
    *,
    budget_macs: float | None = None,
    budget_ms: float | None = None,
    min_accuracy: float | None = None,
    max_risk: tuple[float, float] | None = None,
    exit_ms: Sequence[float] | None = None,
    progress: bool = True,
) -> OperatingPoint:
    """Choose stop thresholds on held-out data and store them under a name. Give exactly one target.

    Args:
        cascade: a cascade, or what :func:`fastcascade.compile` made of one. int8 shifts stop scores, so a
            quantised cascade is calibrated as compiled; the point is then stored in its plan.
        held_out: images that the stages were not trained on: a Dataset, a DataLoader, (images, labels), or a
            :class:`Trace` of them with hashes. Images that :func:`fastcascade.fit` fitted the selector on
            count with their out-of-fold scores. ``max_risk`` needs images that are new to the selector, too,
            and no labels.
        name: the key in the ``operating_points`` of the cascade, or of the plan; a point of that name is
            replaced.
        budget_macs: highest accuracy at a mean cost of at most this, in MACs per instance. No thresholds
            cost less and are more accurate on ``held_out``.
        budget_ms: the same in milliseconds per instance; needs ``exit_ms``.
        min_accuracy: lowest mean cost at an accuracy of at least this, between 0 and 1.
        max_risk: (eps, delta). With probability ≥ 1 − delta over the draw of ``held_out``, new instances of
            the same distribution get another label than the last exit's at a rate of at most eps. If nothing
            can be certified the thresholds are +∞: never stop early.
        exit_ms: (K,) milliseconds per instance of stopping at each exit, earlier stages included: the
            ``exit_ms`` that ``fc.benchmark`` measures. They replace MACs as the cost that is minimised or
            bounded; ``mean_macs`` of the point is in MACs all the same.
        progress: draw a bar on standard error if it takes longer than a second.

    Returns:
        the :class:`OperatingPoint`, with accuracy, cost, exit shares and risk as measured on ``held_out``.
        The accuracy is that of the best thresholds among many on these images, hence slightly optimistic.

    Raises:
        InvalidArgument: not exactly one target, or one out of range.
        CalibrationError: the target cannot be met (the message names the nearest that can), or ``max_risk``
            with images that the cascade was fitted on.
        DataError: labels are needed and missing.

    Warns:
        UserWarning: ``held_out`` has images that the cascade was fitted on, without out-of-fold scores.
        CostWarning: the point costs more MACs than the last network alone. Not where ``exit_ms`` is the cost.

    Example:
        >>> import torch
        >>> from fastcascade.model.resnet import resnet_cifar
        >>> from fastcascade.model.selector import MLPSelector
        >>> cascade = Cascade([resnet_cifar(8), resnet_cifar(14)], MLPSelector(), 10, (3, 32, 32))
        >>> held_out = (torch.randn(20, 3, 32, 32), torch.arange(20) % 10)
        >>> point = calibrate(cascade, held_out, name="fast", budget_macs=2e7)
        >>> point.mean_macs <= 2e7, cascade(held_out[0], operating_point="fast").label.shape
        (True, torch.Size([20]))
    """
    target = _check_target(
        budget_macs=budget_macs, budget_ms=budget_ms, min_accuracy=min_accuracy, max_risk=max_risk
    )
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"the name of an operating point is {name!r}; expected a non-empty string")
    described = cascade if isinstance(cascade, Cascade) else cascade.plan
    seen = held_out if isinstance(held_out, Trace) else trace(cascade, held_out, progress)
    if seen.num_exits != len(described.stages):
        raise InvalidArgument(f"the trace has {seen.num_exits} exits, the cascade {len(described.stages)}")
    source = cascade if isinstance(cascade, Cascade) else cascade.source
    if source is not None:
        _check_overlap(source, seen, refuse=max_risk is not None)
        # Of a precision other than the source's, only a pass over the images tells the source's scores.
        exact = seen
        if source.out_of_fold is not None and cascade is not source and not isinstance(held_out, Trace):
            exact = trace(source, held_out, progress)
        seen = _with_out_of_fold_scores(seen, source, exact)
    if max_risk is not None:
        thresholds = certify(seen.disagrees, seen.exits, risk_path(described), *max_risk)
    elif exit_ms is not None:
        target["exit_ms"] = list(map(float, exit_ms))
        thresholds = find_thresholds_by_time(seen, target["exit_ms"], budget_ms, min_accuracy)
    elif budget_ms is not None:
        raise InvalidArgument("budget_ms needs exit_ms, the measured milliseconds of stopping at each exit")
    else:
        thresholds = find_thresholds(seen, budget_macs=budget_macs, min_accuracy=min_accuracy)
    point = measure_point(seen, thresholds, name, target)
    if exit_ms is None:
        _warn_if_dearer_than_last_network(seen, point)
    if isinstance(cascade, Cascade):
        cascade.operating_points[name] = point
        return point
    point = replace(point, precision=cascade.recorded_precision)
    cascade.store_operating_point(point)
    return point


def find_thresholds(
    seen: Trace, *, budget_macs: float | None = None, min_accuracy: float | None = None
) -> tuple[float, ...]:
    """The K−1 thresholds that serve one of the two targets best on a labelled trace.

    Each stage has up to 257 thresholds to choose from, at evenly spaced quantiles of its scores. All
    combinations are searched for K ≤ 3; with more stages a coarser grid first, then finer ones around the
    best. Of two equally cheap points the more accurate is taken. Of two equally accurate ones the cheaper,
    unless a budget below the cost of never stopping allows the dearer and they are right on different
    instances: then they are equal by luck, and the dearer one is on average better on new instances.

    Returns:
        float32 numbers, midway between neighbouring scores; ±∞ for "nothing stops here" and "all stop here".

    Raises:
        InvalidArgument: not exactly one target, or one out of range.
        CalibrationError: no thresholds serve the target.
        DataError: the trace has no labels.
    """
    _check_target(budget_macs=budget_macs, min_accuracy=min_accuracy)
    return _find(seen, budget_macs, min_accuracy, "MACs")


def _find(seen: Trace, budget: float | None, min_accuracy: float | None, unit: str) -> tuple[float, ...]:
    most = math.inf if budget is None else budget
    thresholds = _Search(seen, most, min_accuracy).run()
    if thresholds is not None:
        return _dearer_equal(seen, thresholds, most) if most < int(seen.exit_macs[-1]) else thresholds
    if budget is not None:
        cheapest = seen.run([-math.inf] * (seen.num_exits - 1))
        raise CalibrationError(
            f"a budget of {budget:,.0f} {unit} cannot be met: stopping everything at the first exit costs "
            f"{cheapest.mean_macs:,.0f} {unit} per instance, at accuracy {cheapest.accuracy:.4f}"
        )
    best = seen.run(_Search(seen, math.inf, None).run())
    raise CalibrationError(
        f"min_accuracy={min_accuracy} cannot be met on these {seen.n} instances: the most accurate "
        f"thresholds found reach {best.accuracy:.4f}, at {best.mean_macs:,.0f} {unit} per instance"
    )


def _dearer_equal(seen: Trace, cheapest: tuple[float, ...], most: float) -> tuple[float, ...]:
    """The dearest thresholds within the budget that are as accurate as the cheapest such; those themselves
    where both are right on the same instances, so that the cost would buy nothing.
    """
    dearest = _Search(seen, most, None, dearest=True).run()
    if dearest is None:
        return cheapest
    right = [np.take_along_axis(seen.correct, seen.exits(t)[None], 0)[0] for t in (cheapest, dearest)]
    equal_by_luck = right[0].sum() == right[1].sum() and bool((right[0] != right[1]).any())
    # With many stages the search is not exhaustive, and either run may have found more.
    return dearest if equal_by_luck or right[1].sum() > right[0].sum() else cheapest


def find_thresholds_by_time(
    seen: Trace, exit_ms: Sequence[float], budget_ms: float | None, min_accuracy: float | None
) -> tuple[float, ...]:
    """:func:`find_thresholds` with milliseconds for MACs."""
    if len(exit_ms) != seen.num_exits or not all(0 < ms < math.inf for ms in exit_ms):
        raise InvalidArgument(
            f"exit_ms is {list(exit_ms)}; expected {seen.num_exits} positive numbers, one per exit"
        )
    # The search adds up whole numbers; a nanosecond is below any measured time's error.
    timed = replace(seen, exit_macs=(np.array(exit_ms) * _NS_PER_MS).round().astype(np.int64))
    budget = None if budget_ms is None else budget_ms * _NS_PER_MS
    return _find(timed, budget, min_accuracy, "ns")


def _check_target(
    *,
    budget_macs: float | None = None,
    budget_ms: float | None = None,
    min_accuracy: float | None = None,
    max_risk: tuple[float, float] | None = None,
) -> dict[str, Any]:
    every = {
        "budget_macs": budget_macs,
        "budget_ms": budget_ms,
        "min_accuracy": min_accuracy,
        "max_risk": max_risk,
    }
    given = {key: value for key, value in every.items() if value is not None}
    if len(given) != 1:
        raise InvalidArgument(f"got the targets {given}; expected exactly one of {', '.join(every)}")
    for budget, unit in ((budget_macs, "MACs"), (budget_ms, "ms")):
        if budget is not None and not budget > 0:
            raise InvalidArgument(
                f"the budget is {budget}; expected a positive number of {unit} per instance"
            )
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise InvalidArgument(f"min_accuracy is {min_accuracy}; expected a share between 0 and 1")
    if max_risk is not None and not (len(max_risk) == 2 and all(0 < x < 1 for x in max_risk)):
        raise InvalidArgument(f"max_risk is {max_risk}; expected (eps, delta), both between 0 and 1")
    return given


def _check_overlap(cascade: Cascade, seen: Trace, refuse: bool) -> None:
    """Images that trained the cascade look easier than new ones: every figure measured on them flatters."""
    if seen.hashes is None or not len(cascade.seen_images):
        return
    fitted = cascade.seen_images
    if cascade.out_of_fold is not None and not refuse:
        fitted = np.setdiff1d(fitted, cascade.out_of_fold.images)
    overlap = int(np.isin(seen.hashes, fitted).sum())
    if not overlap:
        return
    found = f"{overlap} of {seen.n} calibration images are among those that the cascade was fitted on"
    if refuse:
        raise CalibrationError(f"{found}; a bound on the risk would not hold. Give images it has not seen")
    warnings.warn(f"{found}; the operating point will promise too much. Give held-out images", stacklevel=3)


def _with_out_of_fold_scores(seen: Trace, source: Cascade, exact: Trace) -> Trace:
    """The trace with out-of-fold scores for the images that fitted the selector.

    Args:
        exact: the same images at the precision of ``source``. What another precision changes in a score, it
            changes in the out-of-fold score, too.
    """
    if source.out_of_fold is None or seen.hashes is None:
        return seen
    out_of_fold = source.out_of_fold.replace(exact.scores, seen.hashes)
    return replace(seen, scores=out_of_fold + (seen.scores - exact.scores))


def _warn_if_dearer_than_last_network(seen: Trace, point: OperatingPoint) -> None:
    """Such a point is dominated, unless the stages together are more accurate than the last one."""
    dense = int(seen.single_macs[-1])
    if point.mean_macs <= dense:
        return
    verdict = "it saves nothing. Run"
    if point.accuracy is not None:
        _, alone = seen.single_stages()[-1]
        compared = f"({point.accuracy:.2%} against {alone:.2%})"
        verdict = f"it is no more accurate {compared}. Run"
        if point.accuracy > alone:
            points = 100 * (point.accuracy - alone)
            verdict = f"it gains {points:.2f} points of accuracy {compared}. Unless that is worth it, run"
    warnings.warn(
        f"operating point {point.name!r} costs {point.mean_macs:,.0f} MACs per image, more than the "
        f"{dense:,} of the last network alone; on these {point.n:,} images {verdict} the last network by "
        "itself, or set a lower target",
        CostWarning,
        stacklevel=3,
    )


def measure_point(
    seen: Trace, thresholds: tuple[float, ...], name: str, target: dict[str, Any]
) -> OperatingPoint:
    """The operating point of some thresholds, with their figures on a trace."""
    exits = seen.exits(thresholds)
    return OperatingPoint(
        name=name,
        thresholds=thresholds,
        target=target,
        accuracy=None if seen.true_labels is None else seen.run(thresholds).accuracy,
        mean_macs=int(seen.exit_macs[exits].sum()) / seen.n,
        exit_shares=tuple((np.bincount(exits, minlength=seen.num_exits) / seen.n).tolist()),
        n=seen.n,
        risk=float(np.take_along_axis(seen.disagrees, exits[None], 0).mean())
        if "max_risk" in target
        else None,
    )


@dataclass
class _Best:
    """The best combination so far: per stage, an index into its choices."""

    key: tuple[int, int] | None = None
    choice: tuple[int, ...] = ()


class _Choices:
    """The thresholds worth trying at one stage, from "nothing stops" to "everything stops".

    Attributes:
        rank: (N,) position of each instance by falling score; N where it cannot stop here.
        order: (M,) the instances that can stop here, by falling score.
        counts: (T,) how many of ``order`` each choice stops.
        thresholds: (T,) float32.
    """

    def __init__(self, scores: NDArray[np.floating[Any]]) -> None:
        n = len(scores)
        able = np.flatnonzero(~np.isnan(scores))
        self.order = able[np.argsort(-scores[able], kind="stable")]
        self.rank = np.full(n, n)
        self.rank[self.order] = np.arange(len(self.order))
        falling = scores[self.order].astype(np.float64)
        upper, lower = falling[:-1], falling[1:]
        with np.errstate(invalid="ignore"):
            middle = ((upper + lower) / 2).astype(np.float32)
            wide = upper - lower > SMALLEST_GAP * np.maximum(np.abs(upper), np.abs(lower))
        inner = np.flatnonzero(wide & (middle > lower) & (middle <= upper))
        counts = np.concatenate([[0], inner + 1, [len(able)]])
        thresholds = np.concatenate([[np.inf], middle[inner], [-np.inf]])
        kept = np.linspace(0, len(counts) - 1, min(CHOICES, len(counts))).round().astype(np.intp)
        self.counts, self.thresholds = counts[kept], thresholds[kept]


class _Search:
    """Grid search over all thresholds but the last, which is searched in one go; zooms in on the best."""

    def __init__(self, seen: Trace, most: float, min_accuracy: float | None, dearest: bool = False) -> None:
        self.correct = seen.correct
        self.cost = seen.exit_macs
        self.n = seen.n
        self.most = most * seen.n
        self.worth = 1 if dearest else -1  # of cost, among equally accurate combinations
        self.floor = None if min_accuracy is None else min_accuracy * seen.n - 1e-9
        self.choices = [_Choices(s) for s in seen.scores]
        self.best = _Best()

    def run(self) -> tuple[float, ...] | None:
        """The best thresholds, None if none serve the target."""
        if not self.choices:
            served = self._pick(self.correct[0].sum()[None], self.cost * self.n) is not None
            return () if served else None
        outer = self.choices[:-1]
        size = max(3, int(COMBINATIONS ** (1 / len(outer)))) if outer else 1
        centre = [len(c.counts) / 2 for c in outer]
        half = max(centre, default=0.0)
        while True:
            grids = [
                np.unique(np.linspace(m - half, m + half, size).round().clip(0, len(c.counts) - 1)).astype(
                    int
                )
                for m, c in zip(centre, outer, strict=True)
            ]
            self._explore(0, np.ones(self.n, np.bool_), 0, 0, (), grids)
            if self.best.key is None or 2 * half <= size - 1:  # every position in reach has been tried
                break
            centre = [float(i) for i in self.best.choice[:-1]]
            half = min(2 * half / (size - 1), 0.6 * half)
        if self.best.key is None:
            return None
        return tuple(float(c.thresholds[i]) for c, i in zip(self.choices, self.best.choice, strict=True))

    def _explore(
        self,
        k: int,
        active: NDArray[np.bool_],
        correct: int,
        cost: int,
        chosen: tuple[int, ...],
        grids: Sequence[NDArray[np.intp]],
    ) -> None:
        """Try every combination of stages k, …; before it, ``correct`` answers were given at ``cost``."""
        if k == len(grids):
            self._last(active, correct, cost, chosen)
            return
        choices = self.choices[k]
        for i in grids[k]:
            stops = active & (choices.rank < choices.counts[i])
            hits, stopped = int((stops & self.correct[k]).sum()), int(stops.sum())
            rest = active & ~stops
            self._explore(
                k + 1, rest, correct + hits, cost + stopped * int(self.cost[k]), (*chosen, int(i)), grids
            )

    def _last(self, active: NDArray[np.bool_], correct: int, cost: int, chosen: tuple[int, ...]) -> None:
        """All choices of the last threshold at once, by cumulative sums along falling score."""
        k, choices = len(self.choices) - 1, self.choices[-1]
        running = active[choices.order]
        gain = running * (self.correct[k][choices.order].astype(np.int64) - self.correct[-1][choices.order])
        hits = correct + int((active & self.correct[-1]).sum()) + _prefix_sums(gain)[choices.counts]
        saved = int(self.cost[-1] - self.cost[k]) * _prefix_sums(running)[choices.counts]
        total = cost + int(active.sum()) * int(self.cost[-1]) - saved
        i = self._pick(hits, total)
        if i is None:
            return
        key = self._key(int(hits[i]), int(total[i]))
        if self.best.key is None or key > self.best.key:
            self.best = _Best(key, (*chosen, i))

    def _pick(self, hits: NDArray[np.int64], total: NDArray[np.int64]) -> int | None:
        """The best of some combinations, None if no one serves the target."""
        serves = total <= self.most if self.floor is None else hits >= self.floor
        able = np.flatnonzero(serves)
        if not len(able):
            return None
        first, second = (hits, self.worth * total) if self.floor is None else (-total, hits)
        able = able[first[able] == first[able].max()]
        return int(able[second[able].argmax()])

    def _key(self, hits: int, total: int) -> tuple[int, int]:
        return (hits, self.worth * total) if self.floor is None else (-total, hits)


def _prefix_sums(values: NDArray[Any]) -> NDArray[np.int64]:
    """(M,) → (M + 1,): sums of the first 0, 1, …, M values."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
