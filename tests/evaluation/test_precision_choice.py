"""Stage precisions and thresholds for a budget in milliseconds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import CalibrationError, DataError, InvalidArgument
from fastcascade.evaluation import precision_choice
from fastcascade.evaluation.precision_choice import choose_precision

SHAPE = (3, 8, 8)


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip


@pytest.fixture
def cascade() -> fc.Cascade:
    return fc.Cascade([network(8), network(16)], fc.ThresholdSelector("margin"), 4, SHAPE)


@pytest.fixture
def held_out() -> tuple[Tensor, Tensor]:
    return torch.randn(60, *SHAPE), torch.randint(4, (60,))


def invent_times(monkeypatch: pytest.MonkeyPatch, ms: dict[tuple[str, ...], float]) -> None:
    """Stages take the given time, by (stage, precision)."""
    monkeypatch.setattr(precision_choice, "_times", lambda programs, images: {n: ms[n] for n in programs})


def test_the_curve_is_the_best_over_all_combinations(
    cascade: fc.Cascade, held_out: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ms = {("0", "fp32"): 2.0, ("0", "int8"): 1.0, ("1", "fp32"): 8.0, ("1", "int8"): 5.0}
    invent_times(monkeypatch, ms)
    budgets = [0.5, 1.0, 3.0, 6.0, 10.0]
    choices = choose_precision(cascade, held_out, held_out, budgets)
    assert [choice.budget_ms for choice in choices] == budgets[1:]  # the first exit takes 1 ms
    assert choices[0].precision[0] == "int8"
    assert choices[0].point.exit_shares == (1.0, 0.0)
    accuracies = [choice.point.accuracy for choice in choices]
    assert accuracies == sorted(accuracies)  # type: ignore[type-var]
    for choice in choices:
        assert choice.mean_ms <= choice.budget_ms + 1e-9
        assert choice.exit_ms == pytest.approx(
            (ms["0", choice.precision[0]], ms["0", choice.precision[0]] + ms["1", choice.precision[1]])
        )
        fast = fc.compile(cascade, precision=choice.precision, calibration_data=held_out)
        if "int8" in choice.precision:
            fast.store_operating_point(choice.point)
        measured = fc.evaluate(fast, held_out, choice.point)
        assert measured.accuracy == pytest.approx(choice.point.accuracy, abs=0.04)
        assert measured.exit_shares == pytest.approx(choice.point.exit_shares, abs=0.06)


def test_slow_int8_is_not_chosen(
    cascade: fc.Cascade, held_out: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    invent_times(monkeypatch, dict.fromkeys([("0", "fp32"), ("1", "fp32")], 1.0) | {
        ("0", "int8"): 9.0, ("1", "int8"): 9.0
    })  # fmt: skip
    assert choose_precision(cascade, held_out, held_out, [1.5])[0].precision[0] == "fp32"


def test_segments_are_timed_by_what_they_add(held_out: tuple[Tensor, Tensor]) -> None:
    def head(width: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))

    segments = [
        fc.Stage(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), exit=head(8)),
        fc.Stage(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), exit=head(8), input="previous"),
    ]
    cascade = fc.Cascade(segments, fc.ThresholdSelector("margin"), 4, SHAPE)
    choice = choose_precision(cascade, held_out, held_out, [1e6])[0]
    assert len(choice.exit_ms) == 2
    assert 0 < choice.exit_ms[0] < choice.exit_ms[1] < math.inf


def test_what_cannot_be_chosen_is_refused(cascade: fc.Cascade, held_out: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(CalibrationError, match="the fastest first exit takes"):
        choose_precision(cascade, held_out, held_out, [1e-9])
    with pytest.raises(InvalidArgument, match="expected positive numbers"):
        choose_precision(cascade, held_out, held_out, [])
    with pytest.raises(DataError, match="no labels"):
        choose_precision(cascade, held_out, (held_out[0], None), [1.0])
