"""Temperatures: part of a stage's exit in the cascade, part of its weights in a plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.lowering.operations import Linear, ScaleShift
from fastcascade.model.resnet import cut_into_segments, resnet_cifar
from fastcascade.testing.comparison import assert_drop_in
from fastcascade.testing.networks import randomise_statistics

SHAPE = (3, 16, 16)
TEMPERATURES = torch.tensor([2.5, 0.4, 1.3])


class Sorted(nn.Module):
    """A head that no operation of a plan expresses."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5].sort(dim=1).values * 4


def independent(combine: str | tuple[float, ...] = "last") -> fc.Cascade:
    nets = [resnet_cifar(8, 5, width=4), resnet_cifar(8, 5, width=8), resnet_cifar(14, 5, width=8)]
    return fc.Cascade([randomise_statistics(n) for n in nets], fc.MLPSelector(), 5, SHAPE, combine)


def segments() -> fc.Cascade:
    net = randomise_statistics(resnet_cifar(20, 5, width=8))
    parts = cut_into_segments(net, after=[3, 6])
    stages = [fc.Stage(m, e, input="previous" if k else "image") for k, (m, e) in enumerate(parts)]
    return fc.Cascade(stages, fc.ThresholdSelector("max_prob"), 5, SHAPE, "mean")


def logits_that_are_features() -> fc.Cascade:
    """The second stage reads the first one's logits, which a temperature must not touch."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    stages = [fc.Stage(first), fc.Stage(nn.Linear(5, 5), input="previous"), fc.Stage(resnet_cifar(8, 5))]
    return fc.Cascade(stages, fc.MLPSelector(), 5, SHAPE)


def without_linear() -> fc.Cascade:
    """Logits from a pool, from a ReLU, and from a module that stays opaque."""
    pooled = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rectified = nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.ReLU())
    return fc.Cascade([pooled, rectified, Sorted()], fc.MLPSelector(), 5, SHAPE, (0.2, 0.5, 1.0))


BUILDERS: list[Callable[[], fc.Cascade]] = [
    independent,
    lambda: independent("mean"),
    segments,
    logits_that_are_features,
    without_linear,
]


def tempered(build: Callable[[], fc.Cascade]) -> fc.Cascade:
    """With logits large enough that few instances are near a tie or a threshold."""
    cascade = build()
    for k in range(3):
        weighted = [m for m in cascade.stage(k).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for layer in weighted[-1:]:
            with torch.no_grad():
                layer.weight *= 3 / cascade.eval().all_logits(torch.randn(50, *SHAPE))[k].std()
    cascade.temperatures.copy_(TEMPERATURES)
    return cascade.eval()


def test_the_cascade_divides_logits_before_everything_else() -> None:
    cascade, x = tempered(lambda: independent("mean")), torch.randn(20, *SHAPE)
    logits, scores = cascade.all_exits(x)
    probs = (logits / TEMPERATURES[:, None, None]).softmax(2)
    judged = cascade.judge(logits)
    torch.testing.assert_close(judged.log_probs[1].exp(), probs[:2].mean(0))
    plain = independent()  # the same stages would answer so at T = 1 after division
    plain.load_state_dict(cascade.state_dict())
    plain.combine, plain.temperatures[:] = "mean", 1.0
    torch.testing.assert_close(plain.judge(logits / TEMPERATURES[:, None, None]).scores, scores)
    for j in range(3):
        out = cascade(x, fc.types.forced_exit(j, 3))
        torch.testing.assert_close(out.probs, judged.log_probs[j].exp())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("build", BUILDERS)
def test_compiled_cascades_are_drop_in(build: Callable[[], fc.Cascade], backend: str) -> None:
    cascade, x = tempered(build), torch.randn(96, *SHAPE)
    assert_drop_in(fc.compile(cascade, backend=backend), cascade, x, tolerance=1e-3, band=2e-4)


@pytest.mark.parametrize("build", [independent, segments])
def test_a_saved_plan_keeps_them(build: Callable[[], fc.Cascade], tmp_path: Path) -> None:
    cascade, x = tempered(build), torch.randn(64, *SHAPE)
    fc.plan(cascade).save(tmp_path)
    assert_drop_in(fc.compile(fc.load_plan(tmp_path)), cascade, x, tolerance=1e-3, band=2e-4)


def test_they_fold_into_the_last_linear_layer() -> None:
    """Neither an operation nor a multiply more than without."""
    cascade = independent().eval()
    plain = fc.plan(cascade)
    cascade.temperatures.copy_(TEMPERATURES)
    folded = fc.plan(cascade)
    assert [len(s.ops) for s in folded.stages] == [len(s.ops) for s in plain.stages]
    for k in range(3):
        before, after = plain.stages[k].ops[-1], folded.stages[k].ops[-1]
        assert isinstance(before, Linear)
        assert isinstance(after, Linear)
        expected = (before.weight.double() / TEMPERATURES[k].double()).float()
        torch.testing.assert_close(after.weight, expected, rtol=2e-7, atol=0)


def test_logits_without_a_linear_layer_get_an_operation_of_their_own() -> None:
    stages = fc.plan(tempered(without_linear)).stages
    assert isinstance(stages[1].ops[-1], ScaleShift)
    assert stages[2].opaque_reason


def test_weights_saved_without_temperatures_load_with_one() -> None:
    cascade = tempered(independent)
    weights = {name: t for name, t in cascade.state_dict().items() if name != "temperatures"}
    cascade.load_state_dict(weights)
    assert cascade.temperatures.tolist() == [1, 1, 1]
