"""The statistics of benchmark comparisons: equal things rarely differ, a planted 5 % is found."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # at the end: fastcascade itself stays the installed one

from bench.ratios import ratio, ratios_together, student_t

RUNS = 400
ROUNDS = 40


def times(slowdown: float, noise: np.random.Generator) -> tuple[list[float], list[float]]:
    """One run: 2 % noise a turn, a few hiccups, a drift by a fifth, two processes half a percent apart."""
    drift = 1 + 0.2 * np.linspace(0, 1, ROUNDS)
    hiccups = 1 + 0.1 * (noise.random((2, ROUNDS)) < 0.05)
    placement = 1 + 0.005 * noise.standard_normal((2, 1))
    turns = placement * drift * hiccups * (1 + 0.02 * noise.standard_normal((2, ROUNDS)))
    return turns[0].tolist(), (slowdown * turns[1]).tolist()


def found(slowdown: float) -> float:
    """Share of runs over four cases in which the first, which alone may be slower, shows a difference.

    Where nothing is slower: in which any of them does.
    """
    noise, count = np.random.default_rng(0), 0
    for _ in range(RUNS):
        first, *others = ratios_together([times(slowdown if k == 0 else 1.0, noise) for k in range(4)])
        differing = [not value.is_noise for value in (first, *others)]
        count += differing[0] if slowdown != 1.0 else any(differing)
    return count / RUNS


def test_a_commit_beside_itself_differs_in_at_most_one_run_of_twenty() -> None:
    assert found(1.0) <= 1 / 20


def test_a_planted_slow_down_of_five_percent_is_found_in_nineteen_of_twenty() -> None:
    assert found(1.05) >= 19 / 20


def test_intervals_without_correction_would_flag_too_often() -> None:
    noise = np.random.default_rng(0)
    runs = [[ratio(*times(1.0, noise)) for _ in range(4)] for _ in range(RUNS)]
    assert np.mean([any(not value.is_noise for value in run) for run in runs]) > 1 / 20


def test_more_confidence_gives_wider_intervals() -> None:
    a, b = times(1.0, np.random.default_rng(1))
    usual, careful = ratio(a, b), ratio(a, b, confidence=0.99)
    assert careful.low < usual.low < usual.value == careful.value < usual.high < careful.high


@pytest.mark.parametrize(
    ("degrees", "expected"), [(4, 2.776), (6, 2.447), (9, 2.262), (19, 2.093), (60, 2.000)]
)
def test_quantiles_of_students_t(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, rel=0.01)


def test_one_round_proves_nothing() -> None:
    assert ratio([1.0], [2.0]).is_noise
