"""Whole cascades in bf16, where the CPU has the instructions or test_bf16_emulated.py emulates them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade import _C, runtime
from fastcascade.engine import CompiledCascade
from fastcascade.errors import InvalidArgument
from fastcascade.evaluation.evaluation import trace
from fastcascade.types import forced_exit

pytestmark = pytest.mark.skipif(_C.bf16_refusal() is not None, reason=str(_C.bf16_refusal()))
SHAPE = (3, 16, 16)


class Block(nn.Module):
    """A bottleneck: two layers in bf16 that read the same value, one by Winograd, one depthwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.shortcut = nn.Conv2d(width, 16, 1), nn.Conv2d(width, 2 * width, 1, 2)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, 2, 1, groups=16)
        self.wide = nn.Conv2d(16, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.middle(self.narrow(x).relu()).relu())
        return (self.wide(y) + self.shortcut(x)).relu()


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), Block(width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 33), nn.ReLU(), nn.Linear(33, 5),
    )  # fmt: skip


@pytest.fixture
def held_out() -> tuple[Tensor, Tensor]:
    return torch.randn(80, *SHAPE), torch.randint(5, (80,))


@pytest.fixture
def cascade() -> fc.Cascade:
    nets = [network(16), network(24)]
    with torch.no_grad():
        for net in nets:
            net[-1].weight.mul_(30)
            net[-1].bias.zero_()
    return fc.Cascade(nets, fc.ThresholdSelector("margin"), 5, SHAPE)


@pytest.fixture
def compiled(cascade: fc.Cascade) -> CompiledCascade:
    return fc.compile(cascade, precision="bf16")


def test_the_layers_that_multiply_in_bf16(compiled: CompiledCascade) -> None:
    (stage, _) = compiled.program.describe()
    assert [kernel.kernel for kernel in stage.kernels] == [
        "load_f32",
        "conv_direct_f32",  # reads the image
        "round_bf16",
        "conv_direct_bf16",  # narrow
        "conv3x3_winograd_f32",
        "conv_depthwise_f32",
        "conv_direct_bf16",  # shortcut, of what was rounded for narrow
        "round_bf16",
        "conv_direct_bf16",  # wide
        "pool_average_f32",
        "flatten_f32",
        "round_bf16",
        "linear_bf16",
        "linear_f32",  # makes the logits
        "exit_row_f32",
    ]
    text = compiled.describe()
    assert text.startswith("backend cpu, bf16 on cpu")
    assert "round to bf16" in text
    assert "conv_direct_bf16" in text


def test_probabilities_are_close_to_those_in_float32(
    cascade: fc.Cascade, compiled: CompiledCascade, held_out: tuple[Tensor, Tensor]
) -> None:
    images = held_out[0].clone()
    images[3] = torch.nan
    exact, exits = fc.compile(cascade), range(2)
    for k in exits:
        got, expected = (program(images, forced_exit(k, 2)) for program in (compiled, exact))
        assert torch.equal(got.probs.isnan(), expected.probs.isnan())
        difference = (got.probs - expected.probs).abs().nan_to_num()
        assert 1e-5 < float(difference.max()) < 0.1, "0 would not be bf16"
        assert int(got.label[3]) == -1
        alone = torch.cat([compiled(image[None], forced_exit(k, 2)).probs for image in images])
        assert torch.equal(alone.nan_to_num(), got.probs.nan_to_num())


def test_points_serve_the_precision_that_they_were_measured_at(
    cascade: fc.Cascade, compiled: CompiledCascade, held_out: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    images = held_out[0]
    budget = float(compiled.plan.exit_macs.double().mean())
    exact = fc.calibrate(cascade, held_out, name="exact", budget_macs=budget)
    with pytest.raises(InvalidArgument, match="measured with stages in fp32, but they run in bf16 bf16"):
        compiled(images, operating_point=exact)
    point = fc.calibrate(compiled, held_out, name="fast", budget_macs=budget)
    assert point.precision == ("bf16", "bf16")
    assert list(compiled.usable_points) == ["fast"]
    measured = fc.evaluate(compiled, held_out, "fast")
    assert measured.accuracy == point.accuracy
    assert measured.exit_shares == pytest.approx(point.exit_shares)
    with pytest.raises(InvalidArgument, match="measured with stages in bf16 bf16, but they run in fp32"):
        cascade(images, operating_point=point)

    compiled.plan.save(tmp_path)
    again = fc.compile(tmp_path, precision="bf16")
    expected = compiled(images, "fast")
    assert torch.equal(again(images, "fast").probs, expected.probs)
    with pytest.raises(InvalidArgument, match="in bf16 bf16, but they run in fp32"):
        fc.compile(tmp_path)(images, "fast")
    without_torch = runtime.load(tmp_path, precision="bf16")
    out = without_torch(images.numpy(), "fast")
    assert np.array_equal(out.label, expected.label.numpy())
    assert np.array_equal(out.probs, expected.probs.numpy())
    with pytest.raises(InvalidArgument, match="'fast' was measured at another precision"):
        runtime.load(tmp_path)(images.numpy(), "fast")


def test_a_trace_is_that_of_what_runs(
    cascade: fc.Cascade, compiled: CompiledCascade, held_out: tuple[Tensor, Tensor]
) -> None:
    seen, exact = trace(compiled, held_out), trace(cascade, held_out)
    labels = [compiled(held_out[0], forced_exit(k, 2)).label.numpy() for k in range(2)]
    assert np.array_equal(seen.own_labels, np.stack(labels))
    assert not np.array_equal(seen.scores, exact.scores)


def test_a_cascade_with_an_opaque_stage(cascade: fc.Cascade, held_out: tuple[Tensor, Tensor]) -> None:
    """The stages that the engine knows run in bf16, the others in torch."""
    plan = fc.plan(cascade)
    whole = fc.compile(plan, precision="bf16")
    module = cascade.stage(1).eval()
    last = replace(plan.stages[1], ops=(), module=module, opaque_reason="a test")
    mixed = fc.compile(replace(plan, stages=(plan.stages[0], last)), precision="bf16")
    for k, same in enumerate((True, False)):
        got, expected = (program(held_out[0], forced_exit(k, 2)).probs for program in (mixed, whole))
        assert torch.allclose(got, expected, atol=1e-6 if same else 0.1)


def test_a_benchmark_compares_the_precisions(cascade: fc.Cascade) -> None:
    measured = fc.benchmark(
        cascade, batches=[4], precision="bf16", operating_point=[1.0], rounds=1, seconds=0.01
    )
    assert measured.precision == "bf16"
    assert {"precision fp32"} <= {what.change for what in measured.what_if}
