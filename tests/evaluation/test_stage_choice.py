"""Choosing stages: the chain that should win wins, its figures hold on new images, bad input is named."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcascade as fc
from fastcascade.errors import CalibrationError, DataError, InvalidArgument
from fastcascade.evaluation.calibration import find_thresholds
from fastcascade.evaluation.evaluation import Trace
from fastcascade.evaluation.stage_choice import read_pool, stage_choices
from fastcascade.evaluation.threshold_grid import BinnedScores, ThresholdGrid

MACS = [1e6, 2e6, 4e6, 12e6]


def pool(n: int, seed: int = 0, skills: tuple[float, ...] = (1.0, 0.2, 2.5, 5.0)) -> tuple[Tensor, Tensor]:
    """Classifiers that find the same images hard; the second is worse than the first and costs twice."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=g)
    difficulty = torch.randn(n, generator=g) * 2
    logits = torch.randn(len(skills), n, 5, generator=g)
    for k, skill in enumerate(skills):
        logits[k, torch.arange(n), labels] += 1.5 + skill - difficulty
    return logits, labels


def test_a_classifier_that_is_worse_and_dearer_is_left_out_and_the_curve_rises() -> None:
    choices = stage_choices(*pool(2000), MACS)
    assert [c.budget_macs for c in choices] == sorted(c.budget_macs for c in choices)
    assert choices[0].stages == (0,)
    assert all(1 not in c.stages for c in choices)
    assert any(len(c.stages) > 1 for c in choices)
    for c in choices:
        assert c.mean_macs <= c.budget_macs
        assert sum(c.exit_shares) == pytest.approx(1)
    for a, b in itertools.pairwise(choices):
        assert b.accuracy >= a.accuracy
    best_alone = (pool(2000)[0].argmax(2) == pool(2000)[1]).double().mean(1).max()
    assert choices[-1].accuracy >= best_alone


def test_held_out_figures_hold_on_new_images_and_the_others_flatter() -> None:
    """The procedure's own estimate, against 50,000 fresh images judged by a cascade as it would be built."""
    fresh, truth = pool(50_000, seed=99)
    stored, promised, got, costs = [], [], [], []
    for seed in range(4):
        choice = fc.choose_stages(*pool(1000, seed), MACS, budget=5e6)
        stored.append(choice.accuracy)
        promised.append(choice.held_out_accuracy)
        seen = trace_of(choice, fresh, truth)
        got.append(seen.run(choice.thresholds).accuracy)
        costs.append(seen.run(choice.thresholds).mean_macs)
    assert np.mean(promised) == pytest.approx(np.mean(got), abs=0.015)
    assert np.mean(stored) > np.mean(got) - 0.005
    assert np.mean(costs) == pytest.approx(5e6, rel=0.1)


def trace_of(choice: Any, logits: Tensor, labels: Tensor) -> Trace:
    """The chosen cascade on stored logits; the stages themselves only lend their cost."""
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 5)) for _ in choice.stages]
    stages = [fc.Stage(net, macs=int(MACS[k])) for net, k in zip(nets, choice.stages, strict=True)]
    selector = fc.ThresholdSelector(choice.score) if len(stages) > 1 else None
    cascade = fc.Cascade(stages, selector, 5, (1, 2, 2), combine=choice.combine)
    cascade.temperatures.copy_(torch.tensor(choice.temperatures))
    return Trace.from_logits(cascade, logits[list(choice.stages)], labels)


def test_the_figures_are_those_of_the_cascade() -> None:
    logits, labels = pool(1000)
    for choice in stage_choices(logits, labels, MACS):
        measured = trace_of(choice, logits, labels).run(choice.thresholds)
        assert measured.accuracy == pytest.approx(choice.accuracy, abs=2e-3)
        assert measured.mean_macs == pytest.approx(choice.mean_macs, rel=1e-2)


@pytest.mark.parametrize("exits", [1, 2, 3, 4])
def test_the_grid_counts_what_a_run_counts(exits: int) -> None:
    rng = np.random.default_rng(exits)
    labels = rng.integers(0, 2, (exits, 60))
    scores = rng.normal(size=(exits - 1, 60)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = math.nan
    costs = np.array([3, 5, 11, 20][:exits])
    t = Trace(labels, labels, scores, costs, costs, np.zeros(60, np.int64))
    grid = ThresholdGrid(list(t.correct), [BinnedScores.of(s, 6) for s in scores], costs.tolist())
    for i in range(len(grid.hits)):
        run = t.run(grid.thresholds(i))
        assert (run.accuracy, run.mean_macs) == (grid.hits[i] / 60, grid.cost[i] / 60)
    best = grid.best(60 * 8)
    if best is not None and exits == 2:
        exact = t.run(find_thresholds(t, budget_macs=8))
        assert exact.accuracy >= grid.hits[best] / 60


def test_many_classifiers_take_the_greedy_and_still_find_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcascade.evaluation.stage_choice.EXHAUSTIVE", 6)
    logits, labels = pool(2000)
    choice = fc.choose_stages(logits, labels, MACS, budget=5e6)
    alone = (logits.argmax(2) == labels).double().mean(1)
    assert choice.accuracy > float(alone[2])
    assert len(choice.stages) > 1
    assert 1 not in choice.stages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(200, dtype=torch.int64) + 5}, DataError, "from 5 to 5; expected 0 … 4"),
        ({"labels": torch.zeros(199, dtype=torch.int64)}, InvalidArgument, r"expected \(200,\) integers"),
        ({"macs": [1, 2, 3]}, InvalidArgument, "expected 4 positive"),
        ({"macs": [1, 2, 3, 0]}, InvalidArgument, "expected 4 positive"),
        ({"names": ["a", "a", "b", "c"]}, InvalidArgument, "expected one each"),
        ({"budgets": [5e5]}, CalibrationError, "the cheapest classifier costs 1,000,000"),
        ({"folds": 25}, DataError, "need at least 250"),
        ({"max_stages": 0}, InvalidArgument, "expected 1 … 5"),
        ({"logits": []}, InvalidArgument, "no classifiers"),
        (
            {"logits": [torch.zeros(200, 5), torch.zeros(200, 4)], "names": ["a", "b"], "macs": [1, 2]},
            InvalidArgument,
            r"'b' has logits of shape \(200, 4\), 'a' of \(200, 5\)",
        ),
        (
            {"logits": [torch.zeros(200, 5), torch.zeros(190, 5)], "macs": [1, 2]},
            InvalidArgument,
            r"'1' has logits of shape \(190, 5\), '0' of \(200, 5\); all must judge the same images",
        ),
        (
            {"logits": [torch.zeros(200, 5), torch.full((200, 5), math.nan)], "macs": [1, 2]},
            DataError,
            "'1' are not finite on 200 of 200",
        ),
        ({"logits": torch.zeros(4, 200, 1)}, InvalidArgument, "1 class; expected at least 2"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    logits, labels = pool(200)
    arguments: dict[str, Any] = {"logits": logits, "labels": labels, "macs": MACS, **change}
    with pytest.raises(error, match=message):
        stage_choices(**arguments)


def test_one_classifier_is_its_own_choice() -> None:
    logits, labels = pool(100)
    choice = fc.choose_stages(logits[:1], labels, MACS[:1], budget=1e6)
    assert (choice.stages, choice.thresholds, choice.combine) == ((0,), (), "last")


def test_a_pool_from_a_file(tmp_path: Path) -> None:
    logits, labels = pool(300)
    path = tmp_path / "pool.npz"
    np.savez(path, logits=logits.numpy(), labels=labels.numpy(), macs=MACS, names=["a", "b", "c", "d"])
    choice = stage_choices(**read_pool(path), budgets=[5e6])[0]
    assert set(choice.names) <= {"a", "b", "c", "d"}
    np.savez(path, logits=logits.numpy(), macs=MACS)
    with pytest.raises(InvalidArgument, match=r"lacks \['labels'\]"):
        read_pool(path)
    path.write_text("no archive")
    with pytest.raises(InvalidArgument, match="cannot read"):
        read_pool(path)
