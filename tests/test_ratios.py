"""The statistics of benchmark comparisons: equal things rarely differ, a planted 5 % is found."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

RUNS = 400
ROUNDS = 20


@pytest.fixture(scope="module")
def ratios() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "ratios.py"
    spec = importlib.util.spec_from_file_location("bench_ratios", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_ratios"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def times(slowdown: float, noise: np.random.Generator) -> tuple[list[float], list[float]]:
    """One run: 2 % noise a turn and a few hiccups, on a machine that drifts by a fifth meanwhile."""
    drift = 1 + 0.2 * np.linspace(0, 1, ROUNDS)
    hiccups = 1 + 0.1 * (noise.random((2, ROUNDS)) < 0.05)
    turns = drift * hiccups * (1 + 0.02 * noise.standard_normal((2, ROUNDS)))
    return turns[0].tolist(), (slowdown * turns[1]).tolist()


def flagged(ratios: ModuleType, slowdown: float) -> float:
    noise = np.random.default_rng(0)
    return float(np.mean([not ratios.ratio(*times(slowdown, noise)).is_noise for _ in range(RUNS)]))


def test_a_thing_beside_itself_differs_in_one_run_of_twenty(ratios: ModuleType) -> None:
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)
    assert flagged(ratios, 1.0) < allowed


def test_a_planted_slow_down_of_five_percent_is_found(ratios: ModuleType) -> None:
    assert flagged(ratios, 1.05) > 0.95


def test_more_confidence_gives_wider_intervals(ratios: ModuleType) -> None:
    a, b = times(1.0, np.random.default_rng(1))
    usual, careful = ratios.ratio(a, b), ratios.ratio(a, b, confidence=0.99)
    assert careful.low < usual.low < usual.value == careful.value < usual.high < careful.high


@pytest.mark.parametrize(
    ("degrees", "expected"), [(4, 2.776), (6, 2.447), (9, 2.262), (19, 2.093), (60, 2.000)]
)
def test_quantiles_of_students_t(ratios: ModuleType, degrees: int, expected: float) -> None:
    assert ratios.student_t(degrees) == pytest.approx(expected, rel=0.01)


def test_one_round_proves_nothing(ratios: ModuleType) -> None:
    assert ratios.ratio([1.0], [2.0]).is_noise
