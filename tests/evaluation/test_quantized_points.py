"""Operating points and precision: thresholds serve only what they were measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade import runtime
from fastcascade.data.batches import image_hashes
from fastcascade.engine import CompiledCascade
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.evaluation import trace
from fastcascade.types import OutOfFoldScores

SHAPE = (3, 8, 8)


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5),
    )  # fmt: skip


@pytest.fixture
def held_out() -> tuple[Tensor, Tensor]:
    return torch.randn(80, *SHAPE), torch.randint(5, (80,))


@pytest.fixture
def cascade(held_out: tuple[Tensor, Tensor]) -> fc.Cascade:
    nets = [network(8), network(12), network(16)]
    with torch.no_grad():
        for net in nets:
            net[-1].weight.mul_(30)
    made = fc.Cascade(nets, fc.ThresholdSelector("margin"), 5, SHAPE)
    fc.calibrate(made, held_out, name="fast", budget_macs=0.7 * made.dense_macs)
    return made


@pytest.fixture
def compiled(cascade: fc.Cascade, held_out: tuple[Tensor, Tensor]) -> CompiledCascade:
    return fc.compile(cascade, precision=["int8", "int8", "fp32"], calibration_data=held_out)


def test_a_point_of_another_precision_is_refused(
    cascade: fc.Cascade, compiled: CompiledCascade, held_out: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    images, _ = held_out
    message = "'fast' was measured with stages in fp32, but they run in int8 int8 fp32"
    for point in ("fast", cascade.operating_points["fast"]):
        with pytest.raises(InvalidArgument, match=message):
            compiled(images, operating_point=point)
    compiled.plan.save(tmp_path)
    with pytest.raises(InvalidArgument, match="'fast' was measured at another precision"):
        runtime.load(tmp_path)(images.numpy(), "fast")
    point = fc.calibrate(compiled, held_out, name="fast", budget_macs=0.7 * cascade.dense_macs)
    with pytest.raises(InvalidArgument, match="measured with stages in int8 int8 fp32, but they run in fp32"):
        cascade(images, operating_point=point)
    same = fc.compile(cascade, precision="int8", calibration_data=held_out)
    with pytest.raises(InvalidArgument, match="in int8 int8 fp32, but they run in int8 int8 int8"):
        same(images, operating_point=point)


def test_a_default_of_another_precision_is_not_passed_over(
    cascade: fc.Cascade, held_out: tuple[Tensor, Tensor]
) -> None:
    cascade.operating_points["default"] = replace(cascade.operating_points["fast"], name="default")
    compiled = fc.compile(cascade, precision="int8", calibration_data=held_out)
    with pytest.raises(InvalidArgument, match="'default' was measured with stages in fp32"):
        compiled(held_out[0])


def test_a_compiled_cascade_is_calibrated_as_it_runs(
    cascade: fc.Cascade, compiled: CompiledCascade, held_out: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    before = cascade.operating_points["fast"]
    point = fc.calibrate(compiled, held_out, name="fast", budget_macs=0.7 * cascade.dense_macs)
    assert point.precision == ("int8", "int8", "fp32")
    assert cascade.operating_points["fast"] is before
    measured = fc.evaluate(compiled, held_out, "fast")
    assert measured.accuracy == point.accuracy
    assert measured.mean_macs == pytest.approx(point.mean_macs)
    assert measured.exit_shares == pytest.approx(point.exit_shares)
    compiled.plan.save(tmp_path)
    assert fc.load_plan(tmp_path).operating_points["fast"] == point
    images = held_out[0]
    out = runtime.load(tmp_path)(images.numpy(), "fast")
    assert np.array_equal(out.label, compiled(images, "fast").label.numpy())
    assert fc.calibrate(fc.compile(fc.load_plan(tmp_path)), held_out, min_accuracy=0.05).n == 80


def test_a_trace_of_a_compiled_cascade_is_that_of_the_cascade(
    cascade: fc.Cascade, held_out: tuple[Tensor, Tensor]
) -> None:
    for combine, selector in (("last", fc.MLPSelector()), ("mean", fc.ThresholdSelector("entropy"))):
        made = fc.Cascade(list(cascade.stages), selector, 5, SHAPE, combine=combine)  # type: ignore[arg-type]
        images = held_out[0].clone()
        images[3] = float("nan")
        expected = trace(made, (images, held_out[1]))
        got = trace(fc.compile(made), (images, held_out[1]))
        assert np.array_equal(got.labels, expected.labels)
        assert np.array_equal(got.own_labels, expected.own_labels)
        assert np.allclose(got.scores, expected.scores, atol=1e-3, equal_nan=True)
        assert np.array_equal(got.exit_macs, expected.exit_macs)
        assert np.array_equal(got.single_macs, expected.single_macs)


def test_out_of_fold_scores_shift_as_the_scores_do(
    cascade: fc.Cascade, compiled: CompiledCascade, held_out: tuple[Tensor, Tensor]
) -> None:
    """Images that fitted the selector count with scores as if they had not, at either precision."""
    hashes = image_hashes(held_out[0])
    order = np.argsort(hashes)
    own = trace(cascade, held_out).scores
    far = (own[:, order] - 1000).astype(np.float32)
    cascade.out_of_fold = OutOfFoldScores(hashes[order], far)
    cascade.seen_images = hashes[order]
    point = fc.calibrate(compiled, held_out, name="fast", budget_macs=0.7 * cascade.dense_macs)
    finite = [t for t in point.thresholds if np.isfinite(t)]
    assert finite
    assert all(t < -900 for t in finite)
