"""Post-training quantisation: scales, what becomes int8, what it costs in accuracy, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import InvalidArgument, LoweringError
from fastcascade.lowering import quantization
from fastcascade.lowering.export import plan as lower
from fastcascade.lowering.interpreter import run_stage
from fastcascade.lowering.operations import Activation, Conv2d, Linear, Pool
from fastcascade.lowering.plan import Plan
from fastcascade.lowering.quantization import quantize_plan
from fastcascade.lowering.quantized_operations import (
    Dequantize,
    Quantize,
    QuantizedConv2d,
    QuantizedLinear,
)
from fastcascade.model.resnet import resnet_cifar
from fastcascade.testing.networks import random_network, randomise_statistics

SHAPE = (3, 12, 12)


def plan_of(*networks: nn.Module, selector: object = None) -> Plan:
    torch.manual_seed(1)
    for network in networks:
        randomise_statistics(network).eval()
    return lower(fc.Cascade(list(networks), selector, 10, SHAPE))  # type: ignore[arg-type]


def images(n: int = 32) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(3))


def layers(plan: Plan, k: int = 0) -> list[QuantizedConv2d | QuantizedLinear]:
    return [op for op in plan.stages[k].ops if isinstance(op, QuantizedConv2d | QuantizedLinear)]


def logits(plan: Plan, x: Tensor, k: int = 0) -> Tensor:
    return run_stage(plan.stages[k], x)[1]


def divergence(plan: Plan, quantized: Plan, x: Tensor) -> float:
    ours, expected = logits(quantized, x).log_softmax(1), logits(plan, x).log_softmax(1)
    return float(nn.functional.kl_div(ours, expected, reduction="batchmean", log_target=True))


class Blocks(nn.Module):
    """Depthwise and grouped layers, a residual, ReLU6, squeeze and excitation, a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.hidden, self.head = nn.Linear(16, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(x))
        y = nn.functional.relu6(self.depthwise(x))
        y = x + self.grouped(y)
        gate = self.excite(nn.functional.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = nn.functional.max_pool2d(y * gate, 2)
        return self.head(self.hidden(y.mean((2, 3))).relu())  # type: ignore[no-any-return]


def test_what_becomes_int8() -> None:
    """All but the layer that makes the logits."""
    plan = plan_of(resnet_cifar(8))
    quantized = quantize_plan(plan, images())
    convolutions = sum(isinstance(op, Conv2d) for op in plan.stages[0].ops)
    ops = quantized.stages[0].ops
    assert len(layers(quantized)) == convolutions
    assert [type(op) for op in ops if isinstance(op, Conv2d | Linear)] == [Linear]
    assert [type(op) for op in ops[:2]] == [Quantize, QuantizedConv2d]  # of the image
    assert quantized.precision == ("int8",)
    assert plan.precision == ("fp32",)
    assert (
        sum(isinstance(op, Quantize) for op in ops) <= 3
    )  # the image's, and two shortcuts that pad channels
    assert divergence(plan, quantized, images(64)) < 0.02
    assert "int8 conv 3×3" in str(quantized)


def test_every_kind_of_layer() -> None:
    plan = plan_of(Blocks())
    quantized = quantize_plan(plan, images())
    kinds = {(type(op), getattr(op, "groups", 1)) for op in layers(quantized)}
    assert kinds == {(QuantizedConv2d, 1), (QuantizedConv2d, 2), (QuantizedConv2d, 16), (QuantizedLinear, 1)}
    assert any(getattr(op, "residual", None) is not None for op in layers(quantized))
    assert any(isinstance(op, Activation) and op.kind == "silu" for op in quantized.stages[0].ops)
    assert divergence(plan, quantized, images(64)) < 0.02


def test_max_pools_between_layers_work_on_bytes() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    plan = plan_of(network)
    quantized = quantize_plan(plan, images())
    ops = quantized.stages[0].ops
    pool = next(i for i, op in enumerate(ops) if isinstance(op, Pool))
    assert isinstance(ops[pool - 1], QuantizedConv2d)
    assert isinstance(ops[pool + 1], QuantizedConv2d)
    assert divergence(plan, quantized, images(64)) < 0.02


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_on_the_engine(seed: int) -> None:
    """The engine returns what the twins return; float32 layers round differently, hence the tolerance."""
    plan = lower(fc.Cascade([random_network(seed, 10, SHAPE, every_operation=True).eval()], None, 10, SHAPE))
    if plan.stages[0].module is not None:
        pytest.skip("the network is opaque")
    x = images(48)
    quantized = quantize_plan(plan, x[:32])
    expected = fc.compile(quantized, backend="reference")(x)
    for threads in (1, 3):
        got = fc.compile(quantized, backend="cpu", threads=threads)(x)
        near = (got.probs - expected.probs).abs().amax(1) < 0.02
        assert near.float().mean() > 0.95  # a value between two bytes may fall either way


@pytest.mark.parametrize("n", [1, 2, 5])
def test_threads_that_share_an_image_give_the_same_bits(n: int) -> None:
    plan = quantize_plan(plan_of(Blocks()), images())
    x = images(n)
    x[0, 0, 0, 0] = float("nan")
    one, many = (fc.compile(plan, threads=threads)(x) for threads in (1, 3))
    assert torch.equal(one.probs.nan_to_num(9), many.probs.nan_to_num(9))
    assert one.label[0] == -1
    assert (one.label[1:] >= 0).all()


def test_one_scale_per_output_channel() -> None:
    """Channels of very different sizes are all accurate, which one scale per tensor cannot be."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)
    )
    with torch.no_grad():
        sizes = 10.0 ** torch.arange(-4.0, 4.0)
        network[2].weight.mul_(sizes[:, None, None, None])
        network[2].bias.zero_()
        network[5].weight.div_(sizes.repeat_interleave(100))
    plan = plan_of(network)
    conv = next(op for op in layers(quantize_plan(plan, images())) if op.weight.shape == (8, 8, 1, 1))
    restored = conv.weight.double() * conv.multiplier.double()[:, None, None, None]
    exact = next(op for op in plan.stages[0].ops if isinstance(op, Conv2d) and op.input != 0).weight.double()
    direction = restored.flatten(1) / restored.flatten(1).norm(dim=1, keepdim=True)
    expected = exact.flatten(1) / exact.flatten(1).norm(dim=1, keepdim=True)
    assert (direction - expected).abs().max() < 0.01


def grid(sample: Tensor) -> tuple[float, int]:
    return quantization._best_grid(sample, is_signed=bool((sample < 0).any()))


def test_scales_of_plain_samples() -> None:
    scale, zero_point = grid(torch.rand(10_000))
    assert zero_point == 0
    assert scale == pytest.approx(1 / 255, rel=0.06)
    scale, zero_point = grid(torch.rand(10_000) * 2 - 1)
    assert zero_point in (127, 128)
    assert scale == pytest.approx(1 / 128, rel=0.06)
    scale, zero_point = grid(torch.rand(10_000) * 4 - 1)  # most values are positive: so are most bytes
    assert zero_point == pytest.approx(64, abs=2)
    assert scale == pytest.approx(4 / 255, rel=0.06)
    assert grid(torch.zeros(100)) == (1.0, 0)


@pytest.mark.parametrize("value", [0.3, -7.0, 1e-30, 1e30])
def test_constants_are_kept(value: float) -> None:
    scale, zero_point = grid(torch.full((100,), value))
    q = (value / scale + 0.5) // 1
    assert -zero_point <= q <= 255 - zero_point
    assert q * scale == pytest.approx(value, rel=0.01)


def test_an_outlier_does_not_coarsen_the_rest() -> None:
    sample = torch.cat([torch.rand(60_000), torch.tensor([50.0])])
    assert grid(sample)[0] < 2 / 255


def test_a_layer_with_infinite_activations_stays_in_float32() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 64, 10),
    )  # fmt: skip
    plan = plan_of(network)
    with torch.no_grad():
        plan.stages[0].ops[1].weight.fill_(1e38)  # type: ignore[attr-defined]
    quantized = quantize_plan(plan, images())
    assert [type(op) for op in quantized.stages[0].ops[:2]] == [Conv2d, Conv2d]


def test_a_sensitive_layer_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose rounding flips the result: a difference of two nearly equal large numbers."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.wide, self.last = nn.Conv2d(8, 16, 12), nn.Conv2d(16, 8, 1)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).relu()).relu()
            return self.head(self.last(self.wide(x)).flatten(1))  # type: ignore[no-any-return]

    network = Difference()
    with torch.no_grad():
        network.wide.bias[:8], network.wide.bias[8:] = 1e4, 1e4
        network.last.weight[:, 8:] = -network.last.weight[:, :8]
        # Logits of standard deviation 3 and mean 0, so that the label depends on the image.
        network.head.weight.mul_(3 / network(images(64)).std(0).mean())
        network.head.bias.sub_(network(images(64)).mean(0))
    plan = plan_of(network)
    x = images(64)
    limit = 0.01  # on the first of these images
    monkeypatch.setattr(quantization, "MAX_DIVERGENCE", limit)
    kept = quantize_plan(plan, x)
    assert 0 < len(layers(kept)) < 4
    assert divergence(plan, kept, x) < 5 * limit
    monkeypatch.setattr(quantization, "MAX_DIVERGENCE", 1e9)
    everything = quantize_plan(plan, x)
    assert len(layers(everything)) == 4
    assert divergence(plan, everything, x) > 50 * limit


def test_bias_correction_restores_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(resnet_cifar(8))
    x = images(64)

    def shift(quantized: Plan) -> float:
        return float((logits(quantized, x).mean(0) - logits(plan, x).mean(0)).abs().mean())

    corrected = shift(quantize_plan(plan, x))
    correct = quantization._correct
    monkeypatch.setattr(
        quantization, "_correct", lambda op, *rest: replace(correct(op, *rest), bias=op.bias.double())
    )
    assert corrected < shift(quantize_plan(plan, x))


def test_two_runs_give_the_same_plan() -> None:
    plan = plan_of(resnet_cifar(8))
    first, second = (quantize_plan(plan, images()) for _ in range(2))
    for a, b in zip(first.stages[0].ops, second.stages[0].ops, strict=True):
        assert str(a) == str(b)
        assert all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


def test_mixed_by_stage_and_segments() -> None:
    """A segment quantises the features that it reads; one in float32 is left as it is."""
    backbone = [
        fc.Stage(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
                 exit=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))),
        fc.Stage(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)), input="previous",
                 exit=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))),
    ]  # fmt: skip
    cascade = fc.Cascade(backbone, fc.ThresholdSelector("margin"), 10, SHAPE)
    x = images(40)
    for precision in (["int8", "int8"], ["fp32", "int8"], ["int8", "fp32"]):
        fast = fc.compile(cascade, precision=precision, calibration_data=x)  # type: ignore[arg-type]
        assert fast.plan.precision == tuple(precision)
        assert (len(layers(fast.plan, 1)) == 2) == (precision[1] == "int8")
        out, expected = fast(x, [0.5]), cascade(x, [0.5])
        assert (out.label == expected.label).float().mean() > 0.9


def test_saved_plans_run_the_same_everywhere(tmp_path: Path) -> None:
    plan = quantize_plan(plan_of(resnet_cifar(8)), images())
    plan.save(tmp_path)
    loaded = fc.load_plan(tmp_path)
    x = images(20)
    out = fc.compile(plan)(x)
    assert torch.equal(fc.compile(loaded)(x).probs, out.probs)
    from fastcascade import runtime

    assert torch.equal(torch.from_numpy(runtime.load(tmp_path)(x.numpy()).probs), out.probs)
    weights = [op.weight for op in layers(loaded)]
    assert all(w.dtype == torch.int8 for w in weights)


def test_describe_names_kernels_and_errors() -> None:
    fast = fc.compile(quantize_plan(plan_of(resnet_cifar(8)), images()))
    text = fast.describe()
    assert "int8 on cpu" in text
    assert "int8_" in text
    assert "linear_f32" in text
    assert "error" in text
    assert fast.precision == "int8"


@pytest.mark.parametrize("n", [0, 5, 15])
def test_too_few_images(n: int) -> None:
    with pytest.raises(InvalidArgument, match=f"got {n} calibration images; expected at least 16"):
        quantize_plan(plan_of(resnet_cifar(8)), images(n))


def test_images_that_are_not_finite_are_left_out() -> None:
    plan, x = plan_of(resnet_cifar(8)), images(20)
    x[:3, 0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="3 calibration images are not finite"):
        quantized = quantize_plan(plan, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = quantize_plan(plan, x[3:])
    assert str(quantized) == str(clean)
    x[:5, 0, 0, 0] = float("inf")
    with pytest.raises(InvalidArgument, match="only 15 of 20 calibration images are finite"):
        quantize_plan(plan, x)


def test_bad_calls() -> None:
    plan = plan_of(resnet_cifar(8))
    cascade = fc.Cascade([resnet_cifar(8)], None, 10, SHAPE)
    with pytest.raises(InvalidArgument, match="'int8' needs calibration_data"):
        fc.compile(cascade, precision="int8")
    with pytest.raises(InvalidArgument, match="calibration_data is for precision 'int8'"):
        fc.compile(cascade, calibration_data=images())
    with pytest.raises(InvalidArgument, match="got images of shape"):
        fc.compile(cascade, precision="int8", calibration_data=torch.randn(32, 3, 9, 9))
    with pytest.raises(InvalidArgument, match="one for each of the 1 stages"):
        fc.compile(cascade, precision=["int8", "fp32"], calibration_data=images())
    with pytest.raises(InvalidArgument, match=r"expected .int8., or"):
        fc.quantize(cascade, images(), ["fp16"])  # type: ignore[list-item]
    quantized = fc.quantize(plan, images())
    with pytest.raises(InvalidArgument, match="is quantised already"):
        fc.quantize(quantized, images())
    with pytest.raises(InvalidArgument, match="cannot become 'fp32'"):
        fc.compile(quantized, precision="fp32")
    assert fc.compile(quantized, precision="int8").precision == "int8"


def test_opaque_stages_are_refused_by_name() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(1).values[:, :10]

    cascade = fc.Cascade([Sorted()], None, 10, SHAPE)
    with pytest.raises(LoweringError, match="stage 'stage0' cannot be quantised: it is opaque"):
        fc.compile(cascade, precision="int8", calibration_data=images())


def test_dequantised_values_are_shared() -> None:
    """A value that float32 operations and int8 layers read exists once in each form."""
    plan = quantize_plan(plan_of(Blocks()), images())
    reads = [(type(op), op.reads) for op in plan.stages[0].ops if isinstance(op, Quantize | Dequantize)]
    assert len(reads) == len(set(reads))
