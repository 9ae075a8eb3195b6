"""Calibration: the best thresholds for a target, what is stored, and what is refused."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.data.batches import image_hashes
from fastcascade.errors import CalibrationError, CostWarning, DataError, InvalidArgument
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace, evaluate, trace

COSTS = np.array([10, 40, 90, 160, 250], np.int64)


def random_trace(n: int, exits: int, seed: int = 0, accuracy_rises: bool = True) -> Trace:
    """Instances of varying difficulty; later exits are more often right, scores tell a little about it."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=n)
    skill = np.linspace(0.5, 2.0, exits) if accuracy_rises else np.ones(exits)
    margin = skill[:, None] - difficulty + rng.normal(size=(exits, n)) * 0.7
    labels = (margin < 0).astype(np.int64)  # the true label is 0
    scores = (np.abs(margin[:-1]) + rng.normal(size=(exits - 1, n)) * 0.5).astype(np.float32)
    return Trace(labels, labels, scores, COSTS[:exits], COSTS[:exits], np.zeros(n, np.int64))


def every_choice(t: Trace) -> list[tuple[float, ...]]:
    """All K−1 thresholds that can differ on these instances."""
    choices = []
    for scores in t.scores:
        s = np.unique(scores[~np.isnan(scores)])
        choices.append([-math.inf, *((s[1:] + s[:-1]) / 2).tolist(), math.inf])
    return list(itertools.product(*choices))


def flat_cascade() -> fc.Cascade:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(3)]
    return fc.Cascade(nets, fc.MLPSelector(), 3, (1, 2, 2))


def random_images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 2, 2, generator=generator)
    return images, torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize(("exits", "n"), [(2, 60), (3, 25), (4, 9), (5, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_finds_the_optimum_of_every_combination(exits: int, n: int, seed: int) -> None:
    """Against brute force, for both targets, also with instances that cannot stop at some exit."""
    t = random_trace(n, exits, seed)
    t.scores[np.random.default_rng(seed).random(t.scores.shape) < 0.1] = math.nan
    everything = [t.run(choice) for choice in every_choice(t)]
    budget = float(t.exit_macs[[0, -1]].mean())
    affordable = [e for e in everything if e.mean_macs <= budget]
    most = max(e.accuracy for e in affordable)
    costs = [e.mean_macs for e in affordable if e.accuracy == most]
    found = t.run(find_thresholds(t, budget_macs=budget))
    assert found.accuracy == most
    assert found.mean_macs in (min(costs), max(costs))

    floor = sorted(e.accuracy for e in everything)[len(everything) * 3 // 4]
    cheapest = min((e.mean_macs, -e.accuracy) for e in everything if e.accuracy >= floor)
    found = t.run(find_thresholds(t, min_accuracy=floor))
    assert (found.mean_macs, -found.accuracy) == cheapest


@pytest.mark.parametrize("exits", [2, 3, 4, 5])
def test_no_worse_than_ten_thousand_random_thresholds(exits: int) -> None:
    """Where brute force is out of reach, the search must still beat luck, and leave little of a budget."""
    t = random_trace(3000, exits, seed=1)
    rng = np.random.default_rng(0)
    budget = float(t.exit_macs[0] * 0.6 + t.exit_macs[-1] * 0.4)
    found = t.run(find_thresholds(t, budget_macs=budget))
    quantiles = np.sort(t.scores, 1)
    tried = 0
    for _ in range(10_000 // exits):
        ranks = rng.integers(0, t.n, exits - 1)
        e = t.run(quantiles[np.arange(exits - 1), ranks].tolist())
        if e.mean_macs <= budget:
            tried += 1
            # Thresholds are 1/256 of the instances apart, so a lucky one may be an instance or two ahead.
            assert e.accuracy <= found.accuracy + 2 / t.n
    assert tried > 20
    assert found.mean_macs <= budget


@st.composite
def small_traces(draw: st.DrawFn) -> Trace:
    """Up to 5 exits and 12 instances, any answers, few distinct scores, some of them NaN."""
    exits, n = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    labels = np.array(
        draw(st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=exits, max_size=exits))
    )
    score = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, math.nan])
    rows = draw(st.lists(st.lists(score, min_size=n, max_size=n), min_size=exits - 1, max_size=exits - 1))
    costs = np.array(sorted(draw(st.sets(st.integers(1, 200), min_size=exits, max_size=exits))), np.int64)
    scores = np.array(rows, np.float32).reshape(exits - 1, n)
    return Trace(labels, labels, scores, costs, costs, np.zeros(n, np.int64))


@given(small_traces(), st.floats(0.01, 1.2))
def test_no_point_costs_less_and_is_more_accurate(t: Trace, share: float) -> None:
    """Neither a single exit nor any combination of thresholds dominates what a budget returns."""
    cheapest = t.run([-math.inf] * (t.num_exits - 1)).mean_macs  # NaN scores cannot stop
    budget = cheapest + share * (float(t.exit_macs[-1]) - cheapest)
    found = t.run(find_thresholds(t, budget_macs=budget))
    assert found.mean_macs <= budget
    choices = every_choice(t) if t.num_exits <= 3 else []
    for k in range(t.num_exits):
        choices.append(tuple(fc.types.forced_exit(k, t.num_exits).tolist()))
    for choice in choices:
        other = t.run(choice)
        assert not (other.mean_macs < found.mean_macs and other.accuracy > found.accuracy), choice


def test_a_larger_budget_never_lowers_the_accuracy() -> None:
    """Exit 0 is always right, exit 1 half the time: no budget is a reason to go there."""
    n = 200
    labels = np.stack([np.zeros(n, np.int64), np.arange(n) % 2])
    scores = np.linspace(-1, 1, n, dtype=np.float32)[None]
    costs = np.array([10, 100], np.int64)
    t = Trace(labels, labels, scores, costs, costs, np.zeros(n, np.int64))
    for budget in (10, 50, 90, 100, 200):
        found = t.run(find_thresholds(t, budget_macs=budget))
        assert (found.accuracy, found.mean_macs) == (1.0, 10.0)


def test_of_equally_accurate_points_the_dearer_unless_it_changes_nothing() -> None:
    """Equal by luck: other instances are right. Equal in every instance: the cheaper."""
    labels = np.array([[0, 0, 1, 0], [1, 0, 0, 0]])  # exit 1 wins one instance and loses another
    scores = np.array([[0.0, 2.0, 0.0, 2.0]], np.float32)  # not told apart by the score
    costs = np.array([10, 100], np.int64)
    t = Trace(labels, labels, scores, costs, costs, np.zeros(4, np.int64))
    assert t.run(find_thresholds(t, budget_macs=60)).mean_macs == 55
    same = replace(t, labels=np.zeros_like(labels))
    assert same.run(find_thresholds(same, budget_macs=60)).mean_macs == 10
    assert t.run(find_thresholds(t, budget_macs=100)).mean_macs == 10  # nothing to spend on: never stopping


def test_zooms_in_on_thresholds_between_the_points_of_the_first_grid() -> None:
    """Each early exit is right on its 18 most confident of 256 instances only, which no coarse grid hits."""
    n, group = 256, 18
    labels = np.ones((5, n), np.int64)
    scores = np.empty((4, n), np.float32)
    for k in range(4):
        own = (np.arange(n) + n - k * group) % n  # 0 … 17 are this exit's group
        labels[k, own < group] = 0
        scores[k] = -own
    labels[4] = 0
    t = Trace(labels, labels, scores, COSTS, COSTS, np.zeros(n, np.int64))
    found = t.run(find_thresholds(t, min_accuracy=1.0))
    assert found.exit_shares == (*[group / n] * 4, 1 - 4 * group / n)


def opposed_trace() -> Trace:
    """Two exits whose scores live on different scales: exit 0 is reliable above 5, exit 1 above −5.

    Exit 0 is right on the half with score 6 and wrong on the half with score 4; exit 1 is right on what
    exit 0 gets wrong, but its scores are −4 there. A shared threshold that stops at exit 0 where it is right
    (4 < t ≤ 6) never stops at exit 1, and one that stops at exit 1 stops everything at exit 0.
    """
    n = 100
    easy = np.arange(n) < n // 2
    labels = np.stack([np.where(easy, 0, 1), np.zeros(n, int), np.zeros(n, int)])
    scores = np.stack([np.where(easy, 6.0, 4.0), np.where(easy, -6.0, -4.0)]).astype(np.float32)
    return Trace(labels, labels, scores, COSTS[:3], COSTS[:3], np.zeros(n, np.int64))


def test_a_shared_threshold_is_strictly_worse() -> None:
    t = opposed_trace()
    joint = t.run(find_thresholds(t, min_accuracy=1.0))
    assert joint.accuracy == 1.0
    assert joint.mean_macs == (10 + 40) / 2
    levels = np.linspace(-10, 10, 401)
    shared = min(e.mean_macs for e in (t.run([x, x]) for x in levels) if e.accuracy == 1.0)
    assert shared == (10 + 90) / 2

    budget = 25.0
    assert t.run(find_thresholds(t, budget_macs=budget)).accuracy == 1.0
    assert max(e.accuracy for e in (t.run([x, x]) for x in levels) if e.mean_macs <= budget) == 0.5


def test_milliseconds_may_be_the_cost() -> None:
    """With exit 1 as dear as exit 2 in time, the cheapest way to be always right changes."""
    cascade, t = flat_cascade(), opposed_trace()
    t.labels[1, :50] = 1  # exit 1 is wrong on the easy half, exits 0 and 2 are not
    by_macs = fc.calibrate(cascade, t, min_accuracy=1.0)
    by_time = fc.calibrate(cascade, t, min_accuracy=1.0, exit_ms=(0.1, 0.9, 0.9))
    assert by_macs.exit_shares == (0.5, 0.5, 0.0)
    assert by_time.accuracy == 1.0
    assert by_time.mean_macs in ((10 + 40) / 2, (10 + 90) / 2)  # equally slow, so either will do
    half = fc.calibrate(cascade, t, budget_ms=0.5, exit_ms=(0.1, 0.9, 0.9))
    assert half.accuracy == 1.0
    assert half.target == {"budget_ms": 0.5, "exit_ms": [0.1, 0.9, 0.9]}
    assert fc.calibrate(cascade, t, budget_ms=0.1, exit_ms=(0.1, 0.9, 0.9)).exit_shares == (1.0, 0.0, 0.0)
    with pytest.raises(CalibrationError, match="costs 100,000 ns"):
        fc.calibrate(cascade, t, budget_ms=0.05, exit_ms=(0.1, 0.9, 0.9))


def test_thresholds_lie_midway_between_scores() -> None:
    """So that another backend's rounding moves nothing: here the answer is 5 and anything below −4."""
    first, second = find_thresholds(opposed_trace(), min_accuracy=1.0)
    assert first == 5.0
    assert second in (-5.0, -math.inf)


def test_no_threshold_between_scores_that_rounding_cannot_tell_apart() -> None:
    t = opposed_trace()
    t.scores[0] = 5.0
    t.scores[0, :50] = 5.00001  # twenty steps of float32 above
    first, _ = find_thresholds(t, min_accuracy=1.0)
    assert first == math.inf  # the perfect split of exit 0 hangs on the last bits


def test_stores_what_a_run_measures() -> None:
    cascade = flat_cascade()
    images, labels = random_images(400)
    budget = float(cascade.exit_macs.double().mean())
    point = fc.calibrate(cascade, (images, labels), name="half", budget_macs=budget)
    assert cascade.operating_points["half"] is point
    measured = evaluate(cascade, (images, labels), "half")
    assert (point.accuracy, point.mean_macs) == (measured.accuracy, measured.mean_macs)
    assert point.exit_shares == measured.exit_shares
    assert (point.n, point.target, point.risk) == (400, {"budget_macs": budget}, None)
    assert measured.mean_macs <= budget


def test_a_trace_serves_as_held_out_data() -> None:
    cascade = flat_cascade()
    data = random_images(200)
    direct = fc.calibrate(cascade, data, min_accuracy=0.3)
    assert fc.calibrate(cascade, trace(cascade, data), min_accuracy=0.3) == direct


def test_one_stage_has_nothing_to_choose() -> None:
    cascade = fc.Cascade([nn.Sequential(nn.Flatten(), nn.Linear(4, 3))], None, 3, (1, 2, 2))
    assert fc.calibrate(cascade, random_images(10), budget_macs=12).thresholds == ()
    with pytest.raises(CalibrationError, match="costs 12 MACs"):
        fc.calibrate(cascade, random_images(10), budget_macs=11)
    assert fc.calibrate(cascade, random_images(10), max_risk=(0.1, 0.1)).thresholds == ()


def test_says_what_is_nearest_when_the_target_cannot_be_met() -> None:
    t = random_trace(300, 3)
    cheapest = t.run([-math.inf, -math.inf])
    with pytest.raises(CalibrationError, match=rf"costs 10 MACs .* accuracy {cheapest.accuracy:.4f}"):
        find_thresholds(t, budget_macs=9)
    most = t.run(find_thresholds(t, budget_macs=math.inf))
    with pytest.raises(CalibrationError, match=rf"reach {most.accuracy:.4f}, at {most.mean_macs:,.0f} MACs"):
        find_thresholds(t, min_accuracy=0.9999)
    assert find_thresholds(t, min_accuracy=most.accuracy)  # the nearest that the message names can be met


def test_a_failed_calibration_stores_nothing() -> None:
    cascade = flat_cascade()
    before = fc.calibrate(cascade, random_images(50), budget_macs=1e9)
    with pytest.raises(CalibrationError):
        fc.calibrate(cascade, random_images(50), budget_macs=1)
    assert cascade.operating_points == {"default": before}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "exactly one"),
        ({"budget_macs": 1e6, "min_accuracy": 0.9}, "exactly one"),
        ({"budget_macs": 0}, "positive"),
        ({"budget_macs": math.nan}, "positive"),
        ({"min_accuracy": 93}, "between 0 and 1"),
        ({"budget_ms": 0.3}, "needs exit_ms"),
        ({"budget_ms": -1, "exit_ms": (1, 2, 3)}, "positive number of ms"),
        ({"budget_ms": 1, "exit_ms": (1, 2)}, "3 positive numbers"),
        ({"min_accuracy": 0.1, "exit_ms": (1, 0, 3)}, "3 positive numbers"),
        ({"max_risk": (0.01, 0.0)}, "between 0 and 1"),
        ({"max_risk": (1.5, 0.1)}, "between 0 and 1"),
        ({"max_risk": (0.1,)}, r"\(eps, delta\)"),
    ],
)
def test_refuses_targets_that_mean_nothing(target: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fc.calibrate(flat_cascade(), random_images(10), **target)


def test_other_clear_errors() -> None:
    cascade = flat_cascade()
    images, _ = random_images(10)
    with pytest.raises(DataError, match="no labels"):
        fc.calibrate(cascade, (images, None), budget_macs=1e6)
    with pytest.raises(InvalidArgument, match="non-empty"):
        fc.calibrate(cascade, random_images(10), name="", budget_macs=1e6)
    with pytest.raises(InvalidArgument, match="5 exits, the cascade 3"):
        fc.calibrate(cascade, random_trace(10, 5), budget_macs=1e6)


def trace_of(said: list[list[int]]) -> Trace:
    """Instances of class 0, and what each of three exits says; stages of 2, 2 and 6 multiplies."""
    labels = np.array(said)
    scores = np.zeros((2, labels.shape[1]), np.float32)
    costs, alone = np.array([2, 4, 10]), np.array([2, 2, 6])
    return Trace(labels, labels, scores, costs, alone, np.zeros(labels.shape[1], np.int64))


@pytest.mark.parametrize(
    ("last", "together", "verdict"),
    [
        ([0] * 9 + [1], [0] * 9 + [1], r"is no more accurate \(90.00% against 90.00%\). Run"),
        (
            [0] * 8 + [1] * 2,
            [0] * 9 + [1],
            r"gains 10.00 points of accuracy \(90.00% against 80.00%\). Unless that is worth it, run",
        ),
    ],
)
def test_a_point_dearer_than_the_last_network_warns(
    last: list[int], together: list[int], verdict: str
) -> None:
    """What it costs, what the last network costs, what the difference buys, and what to do."""
    seen = replace(trace_of([[1] * 10, [1] * 10, together]), own_labels=np.array([[1] * 10] * 2 + [last]))
    message = f"'dear' costs 10 MACs per image, more than the 6 of the last .* these 10 images it {verdict}"
    with pytest.warns(CostWarning, match=f"{message} the last network by itself, or set a lower target"):
        fc.calibrate(flat_cascade(), seen, name="dear", min_accuracy=0.9)


def test_a_bound_that_stops_nothing_warns_without_labels() -> None:
    images, _ = random_images(40)
    cascade = flat_cascade()
    with pytest.warns(CostWarning, match="'safe' costs .* on these 40 images it saves nothing"):
        fc.calibrate(cascade, (images, None), name="safe", max_risk=(0.01, 0.01))
    assert cascade.operating_points["safe"].thresholds == (math.inf, math.inf)


@pytest.mark.parametrize("target", [{"min_accuracy": 0.5}, {"budget_ms": 9.0, "exit_ms": [1.0, 2.0, 3.0]}])
def test_a_cheaper_point_or_one_in_time_does_not_warn(target: dict[str, Any]) -> None:
    cheap = "min_accuracy" in target
    seen = trace_of([[0] * 10 if cheap else [1] * 10, [1] * 10, [0] * 10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = fc.calibrate(flat_cascade(), seen, **target)
    assert point.mean_macs == (2 if cheap else 10)


@pytest.mark.parametrize("as_trace", [False, True])
def test_images_that_trained_the_cascade(as_trace: bool) -> None:
    """A warning for a measured point, a refusal for a promise."""
    cascade = flat_cascade()
    images, labels = random_images(40)
    cascade.seen_images = np.sort(image_hashes(images[:7]))
    held_out: Any = trace(cascade, (images, labels)) if as_trace else (images, labels)
    with pytest.warns(UserWarning, match="7 of 40 calibration images"):
        fc.calibrate(cascade, held_out, budget_macs=1e6)
    with pytest.raises(CalibrationError, match="7 of 40 calibration images"):
        fc.calibrate(cascade, held_out, name="safe", max_risk=(0.1, 0.1))
    assert set(cascade.operating_points) == {"default"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", CostWarning)  # three equal networks
        fc.calibrate(cascade, (images[7:], labels[7:]), name="clean", budget_macs=1e6)


def test_overlap_is_found_in_either_layout() -> None:
    """The same photos as NHWC bytes in training and NCHW bytes here."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)]
    normal = fc.Normalize((0.5,) * 3, (0.5,) * 3)
    cascade = fc.Cascade(nets, fc.MLPSelector(), 3, (3, 2, 2), preprocess=normal)
    nchw = np.random.default_rng(0).integers(0, 256, (5, 3, 2, 2), np.uint8)
    cascade.seen_images = np.sort(image_hashes(nchw))
    with pytest.warns(UserWarning, match="5 of 5"):
        fc.calibrate(cascade, (nchw.transpose(0, 2, 3, 1), np.zeros(5, int)), budget_macs=1e6)


@pytest.mark.slow
def test_the_choice_carries_over_to_fresh_instances() -> None:
    """The stored accuracy flatters by little, the budget is met on average, a shared threshold does worse."""
    fresh = random_trace(100_000, 3, seed=1000)
    budget = float(fresh.exit_macs[0] * 0.7 + fresh.exit_macs[-1] * 0.3)
    stored, joint, shared, costs = [], [], [], []
    for seed in range(10):
        t = random_trace(2500, 3, seed)
        thresholds = find_thresholds(t, budget_macs=budget)
        stored.append(t.run(thresholds).accuracy)
        joint.append(fresh.run(thresholds).accuracy)
        costs.append(fresh.run(thresholds).mean_macs)
        levels = [[x, x] for x in np.quantile(t.scores, np.linspace(0, 1, 201)).tolist()]
        affordable = [x for x in levels if t.run(x).mean_macs <= budget]
        shared.append(fresh.run(max(affordable, key=lambda x: t.run(x).accuracy)).accuracy)
    assert 0 < np.mean(stored) - np.mean(joint) < 0.01
    assert np.mean(joint) > np.mean(shared)
    assert np.mean(costs) == pytest.approx(budget, rel=0.02)
