"""The cost–accuracy curve, the paired interval, and the picture."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.curve import (
    Curves,
    cost_accuracy_curve,
    cost_accuracy_curves,
    paired_interval,
    plot_curves,
)
from fastcascade.evaluation.evaluation import Trace, evaluate


def cascade_and_data() -> tuple[fc.Cascade, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Three linear classifiers that see more and more of the truth, and two sets of images."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 9, generator=generator)
    nets = []
    for noise in (1.5, 0.7, 0.1):
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
        net[1].weight.data = 3 * truth + noise * torch.randn(3, 9, generator=generator)
        nets.append(net)
    stages = [fc.Stage(net, macs=macs) for net, macs in zip(nets, (100, 400, 1600), strict=True)]
    cascade = fc.Cascade(stages, fc.ThresholdSelector("margin"), 3, (1, 3, 3))
    images = torch.randn(1200, 1, 3, 3, generator=generator)
    labels = (images.flatten(1) @ truth.T).argmax(1)
    return cascade, (images[:600], labels[:600]), (images[600:], labels[600:])


def test_curve_rises_from_stop_at_once_to_the_best() -> None:
    cascade, selection, _ = cascade_and_data()
    fc.calibrate(cascade, selection, name="cheap", budget_macs=300)
    curves = cost_accuracy_curves(cascade, selection, steps=12)
    confidence = ["confidence: max prob", "confidence: margin", "confidence: entropy"]
    assert list(curves.cascades) == ["cascade", *confidence]
    for curve in curves.cascades.values():
        costs, accuracies = [e.mean_macs for e in curve], [e.accuracy for e in curve]
        assert costs[0] == 100
        assert len(curve) > 6
        assert costs == sorted(costs)
        assert accuracies == sorted(accuracies)  # on the images where the thresholds were found
    assert str(curves.cascades["cascade"]) == str(
        curves.cascades["confidence: margin"]
    )  # it is that baseline here
    assert [macs for macs, _ in curves.single_stages] == [100, 400, 1600]
    assert str(curves.points["cheap"]) == str(evaluate(cascade, selection, "cheap"))


def test_thresholds_come_from_the_selection_and_figures_from_the_report() -> None:
    cascade, selection, report = cascade_and_data()
    curves = cost_accuracy_curves(cascade, report, selection, steps=8)
    assert all(e.n == 600 for e in curves.cascades["cascade"])
    on_report = cost_accuracy_curves(cascade, report, steps=8)
    # What was fitted to the report's own noise must look at least as good there, somewhere better.
    best = [max(e.accuracy for e in c.cascades["cascade"]) for c in (curves, on_report)]
    assert best[0] <= best[1]
    assert str(curves.cascades) != str(on_report.cascades)


def test_one_stage_is_a_point() -> None:
    cascade, selection, _ = cascade_and_data()
    alone = fc.Cascade([cascade.stage(2)], None, 3, (1, 3, 3))
    curves = cost_accuracy_curves(alone, selection)
    assert [e.mean_macs for e in curves.cascades["cascade"]] == [1600]
    assert curves.single_stages == [(1600, curves.cascades["cascade"][0].accuracy)]


def test_paired_interval_covers_the_true_difference() -> None:
    """95 % of the time, over simulated pairs; and it excludes zero where the difference is plain."""
    rng = np.random.default_rng(0)
    for only_a, only_b in ((0.02, 0.02), (0.05, 0.01), (0.002, 0.0)):
        covered = 0
        for u in rng.random((2000, 1000)):
            a, b = u < 0.9 + only_a, (u < 0.9) | (u > 1 - only_b)
            interval = paired_interval(a, b)
            assert interval.difference == pytest.approx(a.mean() - b.mean())
            covered += interval.low <= only_a - only_b <= interval.high
        assert covered / 2000 >= 0.935
        assert covered / 2000 <= 0.97 or only_b == 0  # not needlessly wide
    a = np.arange(1000) < 950
    assert paired_interval(a, np.arange(1000) < 920).low > 0
    assert paired_interval(a, a).low < 0 < paired_interval(a, a).high


def test_pairing_narrows_the_interval() -> None:
    """Two answers that are right on nearly the same instances differ by less than chance alone would say."""
    a, b = np.arange(2000) < 1880, np.arange(2000) < 1860
    low, high = paired_interval(a, b)[1:]
    shuffled = paired_interval(a, np.random.default_rng(0).permutation(b))
    assert high - low < (shuffled.high - shuffled.low) / 2


def test_unpaired_answers_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"shapes \(3,\) and \(4,\)"):
        paired_interval(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(InvalidArgument, match="N > 0"):
        paired_interval(np.ones(0, bool), np.ones(0, bool))


def small_curves() -> Curves:
    """Curves without a cascade behind them."""
    labels = np.array([[0, 1, 1, 0], [0, 0, 0, 0]])
    costs = np.array([10_000_000, 30_000_000])
    scores = np.array([[4.0, 1.0, 2.0, 3.0]], np.float32)
    t = Trace(labels, labels, scores, costs, costs, np.zeros(4, np.int64))
    references = {"published": (40.0, 0.9), "budget": (20.0, None)}
    return Curves({"cascade": cost_accuracy_curve(t)}, t.single_stages(), {"fast": t.run([3.5])}, references)


def test_picture(tmp_path: Path) -> None:
    """An SVG with what was asked for on it, the same bytes each time; a PNG of sensible size."""
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    for name in ("a.svg", "b.svg", "c.png"):
        plot_curves(small_curves(), tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(svg)
    for text in ("fast", "cascade", "single stages", "accuracy, %", "million multiplies per image"):
        assert f"<!-- {text} -->" in svg
    assert svg == (tmp_path / "b.svg").read_text()
    png = (tmp_path / "c.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (1080, 690)


def test_picture_refuses_other_formats(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"ends in \.png or \.svg"):
        plot_curves(small_curves(), tmp_path / "curve.docx")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, fastcascade.evaluation.curve; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_budget_rounding_at_the_cheap_end() -> None:
    """A cost that no float32 holds exactly must not make the first budget unreachable."""
    labels = np.zeros((2, 3), np.int64)
    costs = np.array([123_456_789_123, 987_654_321_987])
    t = Trace(labels, labels, np.ones((1, 3), np.float32), costs, costs, np.zeros(3, np.int64))
    assert cost_accuracy_curve(t)[0].mean_macs == costs[0]
    assert not math.isnan(cost_accuracy_curve(t)[0].accuracy)
