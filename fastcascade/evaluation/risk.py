"""A bound on how often an early answer differs from the last exit's (Learn then Test).

Angelopoulos et al., "Learn then Test" (2021), and Bates et al., "Distribution-free, risk-controlling
prediction sets" (2021): along a sequence of thresholds that was fixed before the calibration data were seen,
test each in turn whether its risk may exceed eps, and stop at the first that cannot be ruled out. Because
the order is fixed and testing ends at the first failure, the chance of ever accepting thresholds whose risk
exceeds eps is at most delta, however many are tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastcascade.kernels.reference import LOG_ODDS_LIMIT
from fastcascade.lowering.plan import Plan
from fastcascade.model.cascade import Cascade
from fastcascade.model.selector import ThresholdSelector

__all__ = ["certify", "hoeffding_bentkus", "risk_path"]

PATH_STEP = 0.05
"""Distance of neighbouring thresholds on the path, in log-odds. A finer path costs no confidence."""


def hoeffding_bentkus(errors: int, n: int, eps: float) -> float:
    """A p-value of "the risk exceeds eps" after ``errors`` among n independent instances.

    The smaller of Hoeffding's bound exp(−n·KL(errors/n ‖ eps)) and Bentkus' bound e·P(Bin(n, eps) ≤ errors).

    Example:
        >>> round(hoeffding_bentkus(0, 100, 0.05), 5)  # 0.95**100
        0.00592
        >>> hoeffding_bentkus(7, 100, 0.05)
        1.0
    """
    share = errors / n
    if share >= eps:
        return 1.0
    hit = share * math.log(share / eps) if errors else 0.0
    hoeffding = math.exp(-n * (hit + (1 - share) * math.log((1 - share) / (1 - eps))))
    return min(1.0, hoeffding, math.e * binomial_cdf(errors, n, eps))


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) ≤ k), summed in logarithms.

    Example:
        >>> round(binomial_cdf(1, 3, 0.5), 12)
        0.5
    """
    i = np.arange(k + 1)
    log_choose = [math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in range(k + 1)]
    terms = np.array(log_choose) + i * math.log(p) + (n - i) * math.log1p(-p)
    largest = terms.max()
    return min(1.0, float(np.exp(largest) * np.exp(terms - largest).sum()))


def risk_path(cascade: Cascade | Plan) -> NDArray[np.float32]:
    """Thresholds from cautious to bold, a function of the kind of selector alone: no data enter.

    All exits share one number λ, which falls from 30 to −30, the range of clamped log-odds: t_k = λ for
    learned scores, maximum probability and margin. The entropy score lies in [−log C, 0] and gets
    t_k = −exp(−λ).

    Returns:
        (steps, K−1) float32.
    """
    steps = round(2 * LOG_ODDS_LIMIT / PATH_STEP)
    level = np.linspace(LOG_ODDS_LIMIT, -LOG_ODDS_LIMIT, steps + 1)
    if isinstance(cascade, Plan):
        first = cascade.stages[0].selector
        is_entropy = first is not None and first.kind == "entropy"
    else:
        is_entropy = isinstance(cascade.selector, ThresholdSelector) and cascade.selector.score == "entropy"
    if is_entropy:
        level = -np.exp(-level)
    return np.repeat(level[:, None], len(cascade.stages) - 1, 1).astype(np.float32)


def certify(
    disagrees: NDArray[np.bool_],
    exits: Callable[[tuple[float, ...]], NDArray[np.intp]],
    path: NDArray[np.float32],
    eps: float,
    delta: float,
) -> tuple[float, ...]:
    """The boldest thresholds on the path that pass the fixed-sequence test; +∞ if not even the first does.

    Args:
        disagrees: (K, N), whether stopping at each exit gives another label than the last exit.
        exits: thresholds (K−1,) → (N,) exit of each instance.
        path: (steps, K−1), in the order of testing, fixed without these data.
        eps, delta: P(risk ≤ eps) ≥ 1 − delta.

    Returns:
        K−1 thresholds.
    """
    certified = tuple([math.inf] * path.shape[1])
    n = disagrees.shape[1]
    for step in path:
        thresholds = tuple(step.tolist())
        errors = int(np.take_along_axis(disagrees, exits(thresholds)[None], 0).sum())
        if hoeffding_bentkus(errors, n, eps) > delta:
            break
        certified = thresholds
    return certified
