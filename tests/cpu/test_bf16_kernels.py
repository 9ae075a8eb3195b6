"""The bf16 kernels against their twin, where the CPU has them or test_bf16_emulated.py emulates them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcascade import _C
from fastcascade.kernels import reference_bf16
from fastcascade.lowering.interpreter import run_op
from fastcascade.lowering.operations import Activation, Add, Conv2d, Flatten, Linear, Op, Pool

pytestmark = pytest.mark.skipif(_C.bf16_refusal() is not None, reason=str(_C.bf16_refusal()))

RunOps = Callable[..., tuple[Tensor, Tensor]]
BF16 = {"kernel": "conv_direct_f32", "precision": "bf16"}  # also of 3×3 layers
CHANNELS = [(1, 3), (3, 16), (15, 17), (16, 1), (17, 31), (33, 15), (64, 65), (65, 64), (300, 33)]
TOLERANCE = 5e-6
"""Of the largest value. One product without rounding would be 2e-3 off."""


def random_conv(channels: int, out: int, kernel: tuple[int, int], **fields: Any) -> Conv2d:
    groups = fields.get("groups", 1)
    weight = torch.randn(out, channels // groups, *kernel) / math.sqrt(channels * math.prod(kernel))
    return Conv2d(**{"output": 1, "input": 0, "weight": weight, "bias": torch.randn(out), **fields})


def twin(x: Tensor, op: Conv2d | Linear, residual: Tensor | None = None) -> Tensor:
    """A layer in bf16, float64 after the sum."""
    if isinstance(op, Linear):
        sums = reference_bf16.linear(x, op.weight)
    else:
        sums = reference_bf16.conv2d(x, op.weight, op.stride, op.padding, op.dilation, op.groups)
    y = sums.double() + op.bias.double().reshape(-1, *(1,) * (sums.ndim - 2))
    if residual is not None:
        y = y + residual.double()
    return run_op(Activation(1, 0, op.activation), [y], ())


def assert_near(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    expected = expected.flatten(1)
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return
    assert (expected != 0).double().mean() > 0.2, "mostly zeros prove nothing"
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"error {error:.2e} of the largest value"


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("image", [(1, 1), (5, 7), (17, 16)])
def test_convolution(run_ops: RunOps, image: tuple[int, int], kernel: tuple[int, int]) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    for (channels, out), n, stride in product(CHANNELS, [0, 1, 3], [(1, 1), (2, 2)]):
        conv = random_conv(channels, out, kernel, padding=padding, stride=stride)
        x = torch.randn(n, channels, *image)
        got, _ = run_ops(x, [conv], "", **BF16)
        assert_near(got, twin(x, conv))


def test_windows_of_every_kind(run_ops: RunOps) -> None:
    windows: list[dict[str, Any]] = [
        {"padding": (2, 0, 3, 1), "dilation": (2, 1)},
        {"padding": (0, 0, 0, 0), "stride": (1, 3)},
        {"padding": (1, 2, 0, 4), "stride": (3, 1), "dilation": (1, 3)},
    ]
    for window, (channels, out) in product(windows, [(6, 9), (48, 24), (51, 96)]):
        conv = random_conv(channels, out, (3, 3), **window)
        x = torch.randn(2, channels, 9, 11)
        got, _ = run_ops(x, [conv], "", **BF16)
        assert_near(got, twin(x, conv))


def test_groups(run_ops: RunOps) -> None:
    """Groups of an even number of channels, after merging; of an odd number, fp32."""
    for per_group, out, in_bf16 in [
        (16, 16, True),
        (2, 32, True),
        (4, 4, True),
        (7, 16, False),
        (5, 48, False),
    ]:
        conv = random_conv(4 * per_group, 4 * out, (3, 3), groups=4, padding=(1, 1, 1, 1))
        x = torch.randn(2, 4 * per_group, 6, 7)
        got, exact = run_ops(x, [conv], "", **BF16)
        assert_near(got, twin(x, conv) if in_bf16 else exact)


@pytest.mark.parametrize("image", [(1, 1), (5, 7), (31, 33)])
def test_sums_of_integers_are_exact(run_ops: RunOps, image: tuple[int, int]) -> None:
    for channels, out in CHANNELS:
        conv = random_conv(channels, out, (3, 3), padding=(1, 1, 1, 1), stride=(2, 1))
        conv.weight.copy_(torch.randint(-4, 5, conv.weight.shape))
        conv.bias.copy_(torch.randint(1, 51, conv.bias.shape))
        x = torch.randint(-3, 4, (2, channels, *image)).float()
        got, exact = run_ops(x, [conv], "", **BF16)
        assert torch.equal(got.double(), exact)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "gelu"])
def test_residual_and_activation(run_ops: RunOps, activation: str) -> None:
    """Sums and residuals are float32: a first layer of whole numbers makes both the same here and there."""
    first = random_conv(17, 17, (1, 1))
    first.weight.copy_(2 * torch.eye(17).reshape(17, 17, 1, 1))
    first.bias.zero_()
    conv = random_conv(17, 17, (3, 3), output=2, input=1, padding=(1,) * 4, activation=activation)
    x = torch.randint(-9, 10, (3, 17, 6, 5)).float()
    got, _ = run_ops(x, [first, replace(conv, residual=1)], "", **BF16)
    assert_near(got, twin(2 * x, conv, 2 * x))
    got, _ = run_ops(x, [first, conv, Add(output=3, input=1, other=2)], "", **BF16)
    assert_near(got, twin(2 * x, conv) + 2 * x.double())


@pytest.mark.parametrize(("channels", "out"), [(1, 2), (15, 17), (64, 33), (1025, 65)])
def test_linear(run_ops: RunOps, channels: int, out: int) -> None:
    linear = Linear(2, 1, torch.randn(out, channels) / math.sqrt(channels), torch.randn(out))
    x = torch.randn(19, channels, 1, 1)
    got, _ = run_ops(x, [Flatten(1, 0), linear], "", **BF16)
    assert_near(got, twin(x.flatten(1), linear))


def test_rounding_of_values_and_weights(run_ops: RunOps) -> None:
    """Times 1, a value is what it was rounded to: the nearest, of halves the even one; NaN and ∞ stay."""
    halves = 1 + torch.arange(512) * 2.0**-8
    special = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan])
    numbers = torch.cat([halves, -halves, torch.randn(500) * 10.0 ** torch.randint(-30, 30, (500,)), special])
    one = random_conv(1, 1, (1, 1), weight=torch.ones(1, 1, 1, 1), bias=torch.zeros(1))
    got, _ = run_ops(numbers.reshape(-1, 1, 1, 1), [one], "", **BF16)
    assert torch.equal(got.flatten().nan_to_num(7), reference_bf16.rounded(numbers).nan_to_num(7))
    assert torch.equal(got.flatten().isnan(), numbers.isnan())
    finite = numbers[numbers.isfinite() & (numbers.abs() < 3e38)]
    weights = random_conv(
        1, len(finite), (1, 1), weight=finite.reshape(-1, 1, 1, 1), bias=torch.zeros(len(finite))
    )
    got, _ = run_ops(torch.ones(1, 1, 1, 1), [weights], "", **BF16)
    assert torch.equal(got.flatten(), reference_bf16.rounded(finite))


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_image(run_ops: RunOps, channels: int, value: float) -> None:
    """The last pair of an odd number of channels is followed by another pixel's first channel."""
    conv = random_conv(channels, 20, (1, 1))
    x = torch.randn(3, channels, 4, 5)
    clean, _ = run_ops(x, [conv], "", **BF16)
    x[1, 0, 0, 0] = value
    got, _ = run_ops(x, [conv], "", **BF16)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    pixels, before = got[1].reshape(20, 20), clean[1].reshape(20, 20)
    assert not pixels[:, 0].isfinite().any()
    assert torch.equal(pixels[:, 1:], before[:, 1:])


def test_threads_give_the_same_bits(run_ops: RunOps, share_ops: Callable[..., Tensor]) -> None:
    """Of their own instances, and of shared ones cut along rows and along channels."""
    for image, channels, out in [((33, 40), 17, 96), ((2, 2), 65, 400), ((9, 9), 64, 64)]:
        ops: list[Op] = [
            random_conv(channels, out, (3, 3), padding=(1, 1, 1, 1), activation="relu"),
            random_conv(out, 24, (1, 1), output=2, input=1, stride=(2, 2)),
        ]
        x = torch.randn(13, channels, *image)
        alone, _ = run_ops(x, ops, "", **BF16)
        together, _ = run_ops(x, ops, "", threads=3, **BF16)
        assert torch.equal(alone, together)
        shared = [share_ops(x[:1], ops, "", threads=threads, **BF16) for threads in (1, 2, 3)]
        assert torch.equal(shared[0], shared[1])
        assert torch.equal(shared[0], shared[2])


def test_layers_that_stay_in_float32_keep_their_bits(run_ops: RunOps) -> None:
    depthwise = random_conv(16, 16, (3, 3), groups=16, padding=(1, 1, 1, 1))
    winograd = random_conv(16, 16, (3, 3), output=2, input=1, padding=(1, 1, 1, 1))
    ops: list[Op] = [depthwise, winograd, Pool(3, 2, "average", (2, 2), (2, 2))]
    x = torch.randn(3, 16, 12, 12)
    got, _ = run_ops(x, ops, "", precision="bf16")
    exact, _ = run_ops(x, ops, "")
    assert torch.equal(got, exact)
