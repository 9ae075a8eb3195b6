"""The risk bound: a simulation with known true risk, that faulty rules fail too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import fastcascade as fc
from fastcascade.evaluation.evaluation import Trace
from fastcascade.evaluation.risk import binomial_cdf, certify, hoeffding_bentkus, risk_path

EPS, DELTA, N, DRAWS = 0.05, 0.1, 1000, 300
LEVELS = np.linspace(3, -3, 61)
PATH = np.repeat(LEVELS[:, None], 4, 1).astype(np.float32)
GRID = np.array(list(itertools.product([math.inf, 0.5, 0.0, -0.5, -math.inf], repeat=4)), np.float32)
EARLY_RISK = 0.051

Rule = Callable[[Trace], tuple[float, ...]]


def draw(rng: np.random.Generator) -> Trace:
    """N instances of five exits. Scores are uniform in (−1, 1); each early exit errs independently of them.

    The true risk is thus known: 0.051 times the share that stops early, whatever the thresholds.
    """
    wrong = (rng.random((4, N)) < EARLY_RISK).astype(np.int64)
    labels = np.concatenate([wrong, np.zeros((1, N), np.int64)])
    scores = rng.uniform(-1, 1, (4, N)).astype(np.float32)
    costs = np.arange(1, 6)
    return Trace(labels, labels, scores, costs, costs)


def early_share(thresholds: tuple[float, ...]) -> float:
    return 1 - math.prod(min(1.0, max(0.0, (t + 1) / 2)) for t in thresholds)


def observed_risk(t: Trace, thresholds: NDArray[np.float32]) -> float:
    return float(np.take_along_axis(t.disagrees, t.exits(tuple(thresholds.tolist()))[None], 0).mean())


def guarded(t: Trace) -> tuple[float, ...]:
    return certify(t.disagrees, t.exits, PATH, EPS, DELTA)


def plug_in(t: Trace) -> tuple[float, ...]:
    """Planted fault: take the boldest thresholds whose observed risk is within the bound."""
    return tuple(next(p for p in PATH[::-1] if observed_risk(t, p) <= EPS).tolist())


def uncorrected_grid(t: Trace) -> tuple[float, ...]:
    """Planted fault: a valid p-value per combination, but the boldest that passes out of all 625 is taken."""
    bold = sorted(GRID, key=lambda g: -early_share(tuple(g)))
    passing = (g for g in bold if hoeffding_bentkus(round(observed_risk(t, g) * t.n), t.n, EPS) <= DELTA)
    return tuple(next(passing, np.full(4, math.inf)).tolist())


def violations(rule: Rule, draws: int) -> tuple[int, float]:
    """How many calibrations end with a true risk above eps, and the mean share that stops early."""
    chosen = [early_share(rule(draw(np.random.default_rng(seed)))) for seed in range(draws)]
    return sum(share * EARLY_RISK > EPS for share in chosen), float(np.mean(chosen))


def holds(broken: int, draws: int) -> bool:
    """One-sided binomial test of P(risk > eps) ≤ delta: False if it is refuted with 99.9 % confidence."""
    return 1 - binomial_cdf(broken - 1, draws, DELTA) >= 0.001 if broken else True


def test_the_bound_holds_and_is_of_use() -> None:
    broken, stopped = violations(guarded, DRAWS)
    assert holds(broken, DRAWS)
    assert stopped > 0.5  # never stopping would be safe too


@pytest.mark.parametrize(("rule", "draws"), [(plug_in, 60), (uncorrected_grid, 60)])
def test_faulty_rules_fail_the_same_test(rule: Rule, draws: int) -> None:
    broken, _ = violations(rule, draws)
    assert not holds(broken, draws)


def test_hoeffding_bentkus_is_a_p_value() -> None:
    """P(p ≤ u) ≤ u for every u when the risk is eps exactly: summed over all outcomes, not simulated."""
    for n, eps in ((50, 0.02), (200, 0.1), (1000, 0.3)):
        p = [hoeffding_bentkus(k, n, eps) for k in range(n + 1)]
        assert p == sorted(p)
        for k in range(n + 1):
            if p[k] < 1:
                assert binomial_cdf(k, n, eps) <= p[k] + 1e-12


def test_binomial_cdf_against_exact_sums() -> None:
    for n, p in ((1, 0.5), (7, 0.3), (40, 0.9)):
        exact = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
        np.testing.assert_allclose([binomial_cdf(k, n, p) for k in range(n + 1)], exact, rtol=1e-12)
    assert binomial_cdf(100, 10_000, 0.02) == pytest.approx(1.5e-15, rel=0.5)  # no underflow


def test_hoeffding_bentkus_is_the_smaller_of_the_two_bounds() -> None:
    n, eps = 100, 0.1
    for k in range(10):
        tail = sum(math.comb(n, i) * eps**i * (1 - eps) ** (n - i) for i in range(k + 1))
        x = k / n
        divergence = (x * math.log(x / eps) if k else 0) + (1 - x) * math.log((1 - x) / (1 - eps))
        expected = min(1.0, math.e * tail, math.exp(-n * divergence))
        assert hoeffding_bentkus(k, n, eps) == pytest.approx(expected, rel=1e-9)


def two_exits(errors: int, n: int) -> Trace:
    """All scores 0; the first exit differs from the last on the given number of instances."""
    labels = np.zeros((2, n), np.int64)
    labels[0, :errors] = 1
    return Trace(labels, labels, np.zeros((1, n), np.float32), np.array([1, 2]), np.array([1, 2]))


def test_certifies_up_to_the_last_error_that_delta_allows() -> None:
    n, eps, delta = 1000, 0.05, 0.1
    most = max(k for k in range(n) if hoeffding_bentkus(k, n, eps) <= delta)
    path = np.array([[0.0]], np.float32)
    for errors, expected in ((most, 0.0), (most + 1, math.inf)):
        t = two_exits(errors, n)
        assert certify(t.disagrees, t.exits, path, eps, delta) == (expected,)


def test_testing_stops_at_the_first_failure() -> None:
    """A bolder step that would pass on its own is out of reach: that is what makes many tests safe."""
    n = 1000
    labels = np.zeros((3, n), np.int64)
    labels[1, :200] = 1  # stopping at exit 1 is bad, stopping at exit 0 is not
    t = Trace(labels, labels, np.zeros((2, n), np.float32), np.arange(1, 4), np.arange(1, 4))
    never, bad, good = [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]
    assert certify(t.disagrees, t.exits, np.array([good], np.float32), 0.05, 0.1) == tuple(good)
    path = np.array([never, bad, good], np.float32)
    assert certify(t.disagrees, t.exits, path, 0.05, 0.1) == tuple(never)


def cascade_of(selector: nn.Module) -> fc.Cascade:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(3)]
    return fc.Cascade(nets, selector, 3, (1, 2, 2))


@pytest.mark.parametrize(
    "selector", [fc.MLPSelector(), *(fc.ThresholdSelector(k) for k in ("max_prob", "margin", "entropy"))]
)
def test_the_path_runs_from_never_stop_to_always_stop(selector: nn.Module) -> None:
    """On a new cascade's scores: nothing stops at its start, everything at its end, and it only falls."""
    cascade = cascade_of(selector)
    path = risk_path(cascade)
    assert (np.diff(path, axis=0) <= 0).all()
    images = torch.randn(50, 1, 2, 2)
    assert (cascade(images, path[0].tolist()).exit_stage == 2).all()
    assert (cascade(images, path[-1].tolist()).exit_stage == 0).all()


def test_the_path_of_the_entropy_is_fine_where_confident_instances_lie() -> None:
    """Entropies of 10⁻⁵ and 10⁻² nats must not fall between the same two steps."""
    levels = risk_path(cascade_of(fc.ThresholdSelector("entropy")))[:, 0]
    assert ((levels < -1e-5) & (levels > -1e-2)).sum() > 100


def test_calibrate_needs_no_labels_and_stores_the_risk() -> None:
    cascade = cascade_of(fc.ThresholdSelector("max_prob"))
    for k in range(3):
        cascade.stage(k).module = cascade.stage(0).module  # all exits agree: bold stopping is safe
    images = torch.randn(500, 1, 2, 2)
    point = fc.calibrate(cascade, (images, None), name="safe", max_risk=(0.05, 0.1))
    assert (point.accuracy, point.risk, point.n) == (None, 0.0, 500)
    assert point.exit_shares == (1.0, 0.0, 0.0)
    assert (cascade(images, operating_point="safe").exit_stage == 0).all()


def test_nothing_certified_never_stops() -> None:
    """Ten instances without an error cannot show a risk of 1 %."""
    cascade = cascade_of(fc.MLPSelector())
    point = fc.calibrate(cascade, (torch.randn(10, 1, 2, 2), None), max_risk=(0.01, 0.05))
    assert point.thresholds == (math.inf, math.inf)
    assert (point.risk, point.exit_shares) == (0.0, (0.0, 0.0, 1.0))


def test_an_early_answer_where_the_last_exit_has_none_counts_as_a_difference() -> None:
    labels = np.array([[0, 1], [0, -1]])
    t = Trace(labels, labels, np.zeros((1, 2), np.float32), np.array([1, 2]), np.array([1, 2]))
    assert t.disagrees.tolist() == [[False, True], [False, False]]
