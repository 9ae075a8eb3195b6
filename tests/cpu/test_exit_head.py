"""The engine's exit head against its twin, with the class that matters in every place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from exit_rows import CLASS_COUNTS, INVALID, outliers, places, rotations
from torch import Tensor

from fastcascade import _C
from fastcascade.backends.cpu import stage_spec
from fastcascade.kernels import reference
from fastcascade.kernels.reference import MLPWeights
from fastcascade.lowering.operations import ScaleShift
from fastcascade.lowering.plan import StagePlan

SCALE = 1e20  # the stage multiplies by it, so that infinite logits need no infinite input
TOLERANCE = 2e-6
SELECTORS = ("stats", "topk", "probs", "max_prob", "margin", "entropy")


def weights_for(selector: str, num_classes: int) -> MLPWeights | None:
    """An MLP whose score is the sum of its features, so that it depends on every one of them."""
    if selector not in ("stats", "topk", "probs"):
        return None
    ones = torch.ones(num_classes if selector == "probs" else 4)
    one = torch.ones(1)
    return MLPWeights(0 * ones, ones, ones[None], 10 * one, one, 0 * one[0])


def engine(num_classes: int, selector: str, stage_weights: tuple[float, ...]) -> _C.Cascade:
    """A cascade of two stages whose logits are its images times SCALE."""
    shape = (num_classes, 1, 1)
    scale = torch.full((num_classes,), SCALE)
    op = ScaleShift(1, 0, scale, 0 * scale)
    stage = stage_spec(StagePlan("s", "image", 0, 0, None, (shape, shape), (op,), 0, 1), False)
    spec: dict[str, Any] = {"score": selector}
    weights = weights_for(selector, num_classes)
    if weights is not None:
        spec |= {name: value.numpy() for name, value in weights._asdict().items()} | {"b2": 0.0}
    return _C.Cascade([stage, stage], [spec, None], num_classes, stage_weights=list(stage_weights))


def run(
    logits: Tensor, selector: str, threshold: float, stage_weights: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_probs, label, exit_stage) of the engine for rows whose two stages both have these logits."""
    images = (logits.double() / SCALE).clamp(-1e19, 1e19).float()[:, :, None, None]
    cascade = engine(logits.shape[1], selector, stage_weights)
    got = cascade.run(images.numpy(), None, np.full(1, threshold, np.float32))
    return torch.from_numpy(got[0]), torch.from_numpy(got[1]), torch.from_numpy(got[2])


def score_of(logits: Tensor, selector: str) -> float:
    """The twin's stop score, one for all of these rows, at the first exit."""
    log_probs = logits.double().log_softmax(1)
    weights = weights_for(selector, logits.shape[1])
    if weights is None:
        scores = reference.threshold_score(selector, log_probs)
    else:
        no_agreement = torch.zeros(len(logits), dtype=torch.float64)
        scores = reference.mlp_score(reference.features(selector, log_probs, no_agreement), weights)
    assert scores.max() - scores.min() < 1e-9
    return float(scores[0])


@pytest.mark.parametrize("stage_weights", [(), (0.3, 0.7)])
@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_maximum_and_mass_in_every_place(num_classes: int, stage_weights: tuple[float, ...]) -> None:
    for value in (1.0, 4.0, 12.0):
        logits = outliers(num_classes, value)
        for threshold in (-math.inf, math.inf):  # both exits
            log_probs, label, exit_stage = run(logits, "margin", threshold, stage_weights)
            assert label.tolist() == places(num_classes)
            assert (exit_stage == int(threshold > 0)).all()
            expected = logits.double().log_softmax(1)
            torch.testing.assert_close(log_probs.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("value", INVALID)
@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_invalid_logits_in_every_place(num_classes: int, value: float) -> None:
    log_probs, label, exit_stage = run(outliers(num_classes, value), "margin", -math.inf)
    assert (label == -1).all()
    assert log_probs.isnan().all()
    assert (exit_stage == 1).all()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
def test_scores_read_every_class(num_classes: int, selector: str) -> None:
    if selector == "topk" and num_classes < 3:
        pytest.skip("topk needs three classes")
    logits = rotations(num_classes)
    score = score_of(logits, selector)
    margin = 1e-5 * max(abs(score), 1)
    assert (run(logits, selector, score - margin)[2] == 0).all()
    assert (run(logits, selector, score + margin)[2] == 1).all()
