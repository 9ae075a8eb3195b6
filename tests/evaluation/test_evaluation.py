"""Evaluation: what is counted, and that a trace answers what the running cascade answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastcascade as fc
from fastcascade.data.batches import count_images
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.evaluation import logits, progress
from fastcascade.evaluation.evaluation import Trace, evaluate, trace, traces
from fastcascade.evaluation.logits import compiling_pays
from fastcascade.types import Combine

CLASSES, SHAPE = 4, (1, 3, 3)


def flat_net(seed: int, scale: float = 1.0) -> nn.Sequential:
    """A linear classifier on 3 × 3 pixels with fixed weights."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * scale
    return net


def independent(combine: Combine = "last", selector: nn.Module | None = None) -> fc.Cascade:
    nets = [flat_net(k, 0.5 + k) for k in range(3)]
    return fc.Cascade(nets, selector or fc.MLPSelector(), CLASSES, SHAPE, combine=combine)  # type: ignore[arg-type]


def segmented() -> fc.Cascade:
    stages = [
        fc.Stage(nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))),
        fc.Stage(
            nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)), "previous"
        ),
    ]
    return fc.Cascade(stages, fc.ThresholdSelector("margin"), CLASSES, SHAPE)


def labelled(n: int, seed: int = 0, bad_rows: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, *SHAPE, generator=generator)
    for row in bad_rows:
        images[row, 0, 1, 1] = math.nan
    return images, torch.randint(CLASSES, (n,), generator=generator)


class Poison(nn.Module):
    """Answers NaN where the first pixel exceeds a limit: rows that are invalid at this stage only."""

    def __init__(self, net: nn.Module, limit: float) -> None:
        super().__init__()
        self.net, self.limit = net, limit

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, :1] > self.limit, math.nan, self.net(x))


def thresholds_between_scores(t: Trace, seed: int) -> list[float]:
    """Random thresholds in the widest quarter of the gaps, so that rounding cannot flip an exit."""
    rng = np.random.default_rng(seed)
    chosen = []
    for scores in t.scores:
        scores = np.sort(scores[~np.isnan(scores)])
        gaps = np.diff(scores)
        k = rng.choice(np.argsort(gaps)[-max(1, len(gaps) // 4) :])
        chosen.append(float(scores[k] + gaps[k] / 2))
    return chosen


def same(a: fc.Evaluation, b: fc.Evaluation) -> bool:
    return str(a) == str(b)  # text, so that NaN equals NaN


def test_counts_by_hand() -> None:
    """Accuracy, cost, shares and per-exit accuracy of four instances that can be followed on paper."""
    cascade = independent(selector=fc.ThresholdSelector("margin"))
    images, _ = labelled(4)
    labels = cascade(images, [-math.inf, 0.0]).label  # everything stops at the first exit
    labels[0] = (labels[0] + 1) % CLASSES
    result = evaluate(cascade, (images, labels), [-math.inf, 0.0])
    assert result.accuracy == 0.75
    assert result.mean_macs == cascade.exit_macs[0]
    assert result.exit_shares == (1.0, 0.0, 0.0)
    assert result.exit_accuracy[0] == 0.75
    assert math.isnan(result.exit_accuracy[1])
    assert math.isnan(result.exit_accuracy[2])
    assert "np." not in str(result)  # plain numbers
    assert (result.n, result.n_invalid) == (4, 0)


def test_invalid_rows_are_wrong_counted_and_charged_in_full() -> None:
    cascade = independent(selector=fc.ThresholdSelector("margin"))
    images, _ = labelled(6, bad_rows=(1, 4))
    labels = cascade(images, [-math.inf, 0.0]).label.clamp(min=0)
    result = evaluate(cascade, (images, labels), [-math.inf, 0.0])
    assert result.n_invalid == 2
    assert result.accuracy == 4 / 6
    assert result.exit_shares == (4 / 6, 0.0, 2 / 6)
    assert result.exit_accuracy[2] == 0.0
    first, _, last = cascade.exit_macs.tolist()
    assert result.mean_macs == (4 * first + 2 * last) / 6


def test_all_forms_of_data_and_of_model_agree() -> None:
    cascade = independent()
    images, labels = labelled(700)  # more than one batch
    expected = evaluate(cascade, (images, labels))
    dataset = TensorDataset(images, labels)
    assert same(evaluate(cascade, dataset), expected)
    assert same(evaluate(cascade, DataLoader(dataset, batch_size=33)), expected)
    assert same(evaluate(cascade, (images.numpy(), labels.numpy())), expected)
    assert same(evaluate(fc.compile(cascade, backend="reference"), (images, labels)), expected)


@pytest.mark.parametrize("combine", ["last", "mean", (0.2, 0.5, 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_trace_equals_the_running_cascade(combine: Combine, seed: int) -> None:
    cascade = independent(combine)
    cascade.stage(0).module = Poison(cascade.stage(0).module, 1.0)
    cascade.stage(2).module = Poison(cascade.stage(2).module, 1.5)
    data = labelled(300, seed, bad_rows=(0, 17))
    t = trace(cascade, data)
    assert (t.labels[0] < 0).sum() > (t.labels[2] < 0).sum() > 2  # each kind of invalid row occurs
    for thresholds in (
        thresholds_between_scores(t, seed),
        [math.inf, math.inf],
        [-math.inf, 0.0],
        [math.inf, -math.inf],
    ):
        out = cascade(data[0], thresholds)
        np.testing.assert_array_equal(t.exits(thresholds), out.exit_stage.numpy())
        assert same(t.run(thresholds), evaluate(cascade, data, thresholds))


def test_trace_equals_the_running_cascade_on_segments() -> None:
    cascade = segmented()
    data = labelled(200)
    t = trace(cascade, data)
    thresholds = thresholds_between_scores(t, 0)
    assert 0 < t.run(thresholds).exit_shares[0] < 1
    assert same(t.run(thresholds), evaluate(cascade, data, thresholds))
    own_cost_of_the_first = cascade.stage_macs[0]
    assert t.single_macs.tolist() == [own_cost_of_the_first, cascade.dense_macs]


@settings(max_examples=30)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=2), st.integers(0, 1), st.floats(0, 4))
def test_raising_a_threshold_never_lowers_an_exit(thresholds: list[float], k: int, rise: float) -> None:
    t = trace(independent(), labelled(60))
    higher = list(thresholds)
    higher[k] += rise
    assert (t.exits(higher) >= t.exits(thresholds)).all()
    assert t.run(higher).mean_macs >= t.run(thresholds).mean_macs


def test_trace_from_saved_logits_is_the_trace_of_the_data() -> None:
    cascade = independent("mean")
    images, labels = labelled(50)
    with torch.no_grad():
        saved = cascade.all_logits(images)
    from_data, from_logits = trace(cascade, (images, labels)), Trace.from_logits(cascade, saved, labels)
    np.testing.assert_array_equal(from_data.labels, from_logits.labels)
    np.testing.assert_array_equal(from_data.scores, from_logits.scores)


@pytest.mark.parametrize("kind", ["max_prob", "margin", "entropy"])
def test_confidence_trace_is_that_of_a_threshold_cascade(kind: Any) -> None:
    """The baseline's scores and costs on a learned cascade's logits are those of the baseline itself."""
    learned, baseline = independent(), independent(selector=fc.ThresholdSelector(kind))
    data = labelled(80, bad_rows=(3,))
    own, borrowed = traces(learned, data, [None, kind])
    expected = trace(baseline, data)
    np.testing.assert_array_equal(borrowed.scores, expected.scores)
    np.testing.assert_array_equal(borrowed.exit_macs, expected.exit_macs)
    assert own.exit_macs[0] == expected.exit_macs[0] + learned.selector_macs[0]


def test_single_stages_are_the_networks_alone() -> None:
    cascade = independent("mean")
    images, labels = labelled(90)
    stages = trace(cascade, (images, labels)).single_stages()
    for k, (macs, accuracy) in enumerate(stages):
        alone = cascade.stage(k)(images)[1].argmax(1)
        assert accuracy == pytest.approx(float((alone == labels).double().mean()))
        assert macs == cascade.stage_macs[k]


def test_training_mode_is_kept() -> None:
    cascade = independent().train()
    trace(cascade, labelled(5))
    assert cascade.training


def test_one_stage() -> None:
    cascade = fc.Cascade([flat_net(0)], None, CLASSES, SHAPE)
    data = labelled(20)
    assert same(trace(cascade, data).run([]), evaluate(cascade, data))


def test_clear_errors() -> None:
    cascade = independent()
    images, labels = labelled(4)
    with pytest.raises(DataError, match="no labels"):
        evaluate(cascade, (images, None))
    with pytest.raises(DataError, match="no labels"):
        trace(cascade, (images, None)).run([0.0, 0.0])
    with pytest.raises(DataError, match="0 instances"):
        evaluate(cascade, (images[:0], labels[:0]))
    with pytest.raises(DataError, match="0 instances"):
        trace(cascade, (images[:0], labels[:0]))
    with pytest.raises(DataError, match="expected 0 … 3"):
        evaluate(cascade, (images, labels + 3))
    with pytest.raises(InvalidArgument, match="expected 2 numbers"):
        trace(cascade, (images, labels)).run([0.0])
    with pytest.raises(InvalidArgument, match=r"expected \(K, N, C\) = \(3, 5, 4\)"):
        Trace.from_logits(cascade, torch.zeros(2, 5, CLASSES))
    with pytest.raises(InvalidArgument, match="unknown score 'gini'"):
        traces(cascade, (images, labels), ["gini"])  # type: ignore[list-item]
    log_probs_only = fc.compile(cascade, backend="reference", output="log_probs")
    with pytest.raises(InvalidArgument, match='output="cascade"'):
        evaluate(log_probs_only, (images, labels))


@pytest.mark.parametrize("build", [independent, segmented])
def test_compiled_stages_say_what_the_eager_ones_do(
    build: Callable[[], fc.Cascade], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, scores, costs and invalid rows; thresholds lie in gaps that rounding cannot cross."""
    cascade = build()
    cascade.temperatures.copy_(torch.linspace(0.5, 2, len(cascade.stages)))
    data = labelled(300, bad_rows=(0, 17))
    slow = trace(cascade, data)
    thresholds = thresholds_between_scores(slow, 0)
    expected = evaluate(cascade, data, thresholds)
    monkeypatch.setattr(logits, "WORTH_COMPILING", 0)
    monkeypatch.setattr(cascade, "all_logits", None)  # nothing runs eagerly
    monkeypatch.setattr(cascade, "forward", None)
    fast = trace(cascade, data)
    np.testing.assert_array_equal(fast.labels, slow.labels)
    np.testing.assert_array_equal(fast.own_labels, slow.own_labels)
    np.testing.assert_allclose(fast.scores, slow.scores, atol=1e-4)
    np.testing.assert_array_equal(fast.hashes, slow.hashes)
    assert same(evaluate(cascade, data, thresholds), expected)
    with pytest.raises(InvalidArgument, match="unknown"):
        evaluate(cascade, data, "unknown")


def test_small_work_is_not_worth_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = independent()
    assert not compiling_pays(cascade, 300)
    assert compiling_pays(cascade, 10**9)
    assert compiling_pays(cascade, None)
    assert not compiling_pays(cascade.double(), 10**9)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(SHAPE), 0)] * 3)


def test_images_are_counted_where_that_is_possible() -> None:
    images, labels = labelled(7)
    dataset = TensorDataset(images, labels)
    forms: list[Any] = [(images, labels), (images.numpy(), None), dataset, DataLoader(dataset, 3)]
    assert [count_images(form) for form in forms] == [7] * 4
    assert count_images(Stream()) is None
    assert count_images(DataLoader(Stream())) is None


@pytest.mark.parametrize(("patience", "terminal", "drawn"), [(-1, 1, True), (60, 1, False), (-1, 0, False)])
def test_a_bar_appears_on_a_terminal_where_one_has_to_wait(
    patience: float,
    terminal: int,
    drawn: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", patience)
    monkeypatch.setenv("TTY_COMPATIBLE", str(terminal))
    cascade = independent()
    evaluate(cascade, labelled(600), [0.0, 0.0])
    trace(cascade, labelled(600))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("running the cascade" in shown.err) == ("running the stages" in shown.err) == drawn
    if not drawn:
        assert shown.err == ""
    evaluate(cascade, labelled(600), [0.0, 0.0], progress=False)
    assert capsys.readouterr().err == ""
